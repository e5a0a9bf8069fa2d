"""The reader of step folders passes a whole one, and names what is wrong with another. Folders here are made up."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import pytest

from checker.folders import checksum, named, newest_whole, problems_of
from checker.stores import MemoryObjects

FOLDER = "step-3-e1-g1"


def put_folder(objects: MemoryObjects, folder: str = FOLDER, shift: int = 0) -> dict[str, Any]:
    """Writes a folder of two data files; what ``latest`` names it by."""
    files = {".metadata": b"meta"}
    for rank in range(2):
        name, data = f"__{rank}_0.distcp", bytes((place + rank + shift) % 256 for place in range(100))
        ranges = {"version": 1, "files": {name: [[10, 20, checksum(data[10:30])], [30, 70, checksum(data[30:100])]]}}
        files |= {name: data, f"ranges-r{rank}.json": json.dumps(ranges).encode()}
    entries = [{"name": name, "size": len(data), "crc64nvme": checksum(data)} for name, data in files.items()]
    files["manifest.json"] = json.dumps({"files": entries}).encode()
    objects.update({f"{folder}/{name}": data for name, data in files.items()})
    return {"manifest": f"{folder}/manifest.json", "sha256": hashlib.sha256(files["manifest.json"]).hexdigest()}


def put_latest(objects: MemoryObjects, *points: dict[str, Any]) -> None:
    objects["latest"] = json.dumps({"point": points[0], "ancestors": list(points[1:])}).encode()


def test_a_whole_folder() -> None:
    objects = MemoryObjects()
    point = put_folder(objects)
    assert problems_of(objects, FOLDER, point["sha256"]) == ()


def _flip(name: str) -> Callable[[MemoryObjects], None]:
    def tamper(objects: MemoryObjects) -> None:
        data = bytearray(objects[f"{FOLDER}/{name}"])
        data[3] ^= 1
        objects[f"{FOLDER}/{name}"] = bytes(data)

    return tamper


def _swap(objects: MemoryObjects) -> None:
    first, second = f"{FOLDER}/__0_0.distcp", f"{FOLDER}/__1_0.distcp"
    objects[first], objects[second] = objects[second], objects[first]


def _truncate(objects: MemoryObjects) -> None:
    objects[f"{FOLDER}/__1_0.distcp"] = objects[f"{FOLDER}/__1_0.distcp"][:50]


def _wrong_range(objects: MemoryObjects) -> None:
    """Files and manifest agree; a range's checksum is that of other bytes."""
    name = "ranges-r0.json"
    ranges = json.loads(objects[f"{FOLDER}/{name}"])
    ranges["files"]["__0_0.distcp"][1][2] = "0" * 16
    objects[f"{FOLDER}/{name}"] = content = json.dumps(ranges).encode()
    manifest = json.loads(objects[f"{FOLDER}/manifest.json"])
    entry = next(each for each in manifest["files"] if each["name"] == name)
    entry.update(size=len(content), crc64nvme=checksum(content))
    objects[f"{FOLDER}/manifest.json"] = json.dumps(manifest).encode()


@pytest.mark.parametrize(
    ("tamper", "says"),
    [
        (_flip("__0_0.distcp"), "__0_0.distcp has"),
        (_flip(".metadata"), ".metadata has"),
        (_flip("ranges-r1.json"), "ranges-r1.json has"),
        (_flip("manifest.json"), "manifest.json is not the one"),
        (_swap, "__1_0.distcp has"),
        (_truncate, "__1_0.distcp has 50 bytes"),
        (lambda objects: objects.pop(f"{FOLDER}/__0_0.distcp"), "__0_0.distcp is missing"),
        (lambda objects: objects.pop(f"{FOLDER}/manifest.json"), "manifest.json is missing"),
    ],
)
def test_what_is_wrong_is_named(tamper: Callable[[MemoryObjects], None], says: str) -> None:
    objects = MemoryObjects()
    point = put_folder(objects)
    tamper(objects)
    assert any(says in problem for problem in problems_of(objects, FOLDER, point["sha256"]))


def test_a_range_that_does_not_fit_its_file() -> None:
    objects = MemoryObjects()
    put_folder(objects)
    _wrong_range(objects)
    (problem,) = problems_of(objects, FOLDER)
    assert "__0_0.distcp: bytes 30 to 100" in problem


def test_the_newest_whole_one() -> None:
    objects = MemoryObjects()
    points = [put_folder(objects, f"step-{step}-e1-g1", step) for step in (30, 20, 10)]
    put_latest(objects, *points)
    assert [folder for folder, _ in named(objects)] == ["step-30-e1-g1", "step-20-e1-g1", "step-10-e1-g1"]
    assert newest_whole(objects) == "step-30-e1-g1"
    del objects["step-30-e1-g1/.metadata"]
    objects["step-20-e1-g1/manifest.json"] += b" "
    assert newest_whole(objects) == "step-10-e1-g1"
    objects["step-10-e1-g1/__0_0.distcp"] = b""
    assert newest_whole(objects) is None
