"""Verifies step folders byte by byte: what a reader may rely on, read without any of Lockstep's code."""

from __future__ import annotations

import hashlib
import json
import re

from awscrt.checksums import crc64nvme

from checker.chain import Json, latest_pointer
from checker.stores import Objects

_DATA = re.compile(r"__(\d+)_\d+\.distcp")


def problems_of(objects: Objects, folder: str, sha256: str | None = None) -> tuple[str, ...]:
    """What is wrong with a step folder, a sentence each: its manifest (against ``sha256``, where that is known), size
    and checksum of every file, and the ranges that readers ask for by themselves. Empty where it is whole."""
    try:
        content = objects.read(f"{folder}/manifest.json")
    except KeyError:
        return (f"{folder}/manifest.json is missing",)
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        return (f"{folder}/manifest.json is not the one that was committed: its checksum differs",)
    try:
        entries = {file["name"]: (file["size"], file["crc64nvme"]) for file in json.loads(content)["files"]}
    except (ValueError, KeyError, TypeError) as error:
        return (f"{folder}/manifest.json can't be read: {error!r}",)
    found, whole = [], dict[str, bytes]()
    for name, expected in entries.items():
        try:
            data = objects.read(f"{folder}/{name}")
        except KeyError:
            found.append(f"{folder}/{name} is missing")
            continue
        if (len(data), checksum(data)) == expected:
            whole[name] = data
        else:
            found.append(
                f"{folder}/{name} has {len(data)} bytes that do not fit its checksum; listed are {expected[0]}"
            )
    for name in whole:
        if match := _DATA.fullmatch(name):
            found += _wrong_ranges(folder, name, whole, f"ranges-r{match[1]}.json", entries)
    return tuple(found)


def _wrong_ranges(folder: str, name: str, whole: dict[str, bytes], ranges: str, entries: Json) -> list[str]:
    if ranges not in entries:
        return [f"{folder}: the manifest does not list {ranges}"]
    if ranges not in whole:
        return []  # said already
    pieces = json.loads(whole[ranges])["files"].get(name)
    if pieces is None:
        return [f"{folder}/{ranges} does not speak of {name}"]
    data = whole[name]
    return [
        f"{folder}/{name}: bytes {offset} to {offset + length} do not fit their checksum in {ranges}"
        for offset, length, expected in pieces
        if checksum(data[offset : offset + length]) != expected
    ]


def named(objects: Objects) -> list[tuple[str, str]]:
    """(folder, sha256 of its manifest) of the states that ``latest`` names, newest first; raises BrokenChainError."""
    pointer = latest_pointer(objects)
    points = [pointer["point"], *pointer["ancestors"]] if pointer["point"] else []
    return [(point["manifest"].rpartition("/")[0], point["sha256"]) for point in points]


def newest_whole(objects: Objects) -> str | None:
    """The folder of the newest state that ``latest`` names and that verifies; raises BrokenChainError."""
    return next((folder for folder, sha256 in named(objects) if not problems_of(objects, folder, sha256)), None)


def checksum(data: bytes) -> str:
    """CRC64NVME as 16 hex digits."""
    return f"{crc64nvme(data):016x}"
