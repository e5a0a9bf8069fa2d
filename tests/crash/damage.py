"""Damages objects on the server's disk: what a broken disk, a careless hand or a torn write leaves."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

Damage = Callable[[Path, random.Random], str]
"""Damages a step folder; says what was done."""


def flip_bit(folder: Path, dice: random.Random) -> str:
    """One bit of a data file."""
    return _flip(dice.choice(data_files(folder)), dice)


def truncate(folder: Path, dice: random.Random) -> str:
    """The end of a data file is gone."""
    file = dice.choice(data_files(folder))
    size = file.stat().st_size
    with file.open("r+b") as handle:
        handle.truncate(dice.randrange(size))
    return f"{file.name} truncated"


def swap(folder: Path, dice: random.Random) -> str:
    """Two data files have changed their places."""
    first, second = dice.sample(data_files(folder), 2)
    contents = first.read_bytes(), second.read_bytes()
    # Into the same files: the server keeps ETag and checksum beside them.
    first.write_bytes(contents[1])
    second.write_bytes(contents[0])
    return f"{first.name} and {second.name} swapped"


def delete(folder: Path, dice: random.Random) -> str:
    """A data file is gone."""
    file = dice.choice(data_files(folder))
    file.unlink()
    return f"{file.name} deleted"


def flip_manifest(folder: Path, dice: random.Random) -> str:
    """One bit of the manifest."""
    return _flip(folder / "manifest.json", dice)


def cut_manifest(folder: Path, dice: random.Random) -> str:
    """A manifest as a torn write would leave it."""
    file = folder / "manifest.json"
    file.write_bytes(file.read_bytes()[: dice.randrange(file.stat().st_size)])
    return "manifest.json truncated"


def flip_metadata(folder: Path, dice: random.Random) -> str:
    """One bit of ``.metadata``, which a careless reader would unpickle."""
    return _flip(folder / ".metadata", dice)


def flip_ranges(folder: Path, dice: random.Random) -> str:
    """One bit of the checksums of ranges."""
    return _flip(dice.choice(sorted(folder.glob("ranges-r*.json"))), dice)


KINDS: dict[str, Damage] = {
    "bit flipped": flip_bit,
    "truncated": truncate,
    "swapped": swap,
    "deleted": delete,
    "manifest flipped": flip_manifest,
    "manifest truncated": cut_manifest,
    ".metadata flipped": flip_metadata,
    "ranges flipped": flip_ranges,
}


def data_files(folder: Path) -> list[Path]:
    """Those that hold tensors. Sample logs are left alone: they are the checker's evidence, no restore reads them."""
    return sorted(folder.glob("__*.distcp"))


def _flip(file: Path, dice: random.Random) -> str:
    place, bit = dice.randrange(file.stat().st_size), dice.randrange(8)
    with file.open("r+b") as handle:
        handle.seek(place)
        byte = handle.read(1)[0]
        handle.seek(place)
        handle.write(bytes([byte ^ 1 << bit]))
    return f"bit {bit} of byte {place} of {file.name} flipped"
