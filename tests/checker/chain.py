"""Follows ``latest`` and the parents of its manifest: the states that count, oldest first."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

from checker.stores import Objects

Json = dict[str, Any]


class BrokenChainError(Exception):
    """The chain of manifests can't be followed to its beginning."""


@dataclass(frozen=True)
class Link:
    """One committed state, and what it says of itself."""

    step: int
    epoch: int
    generation: int
    folder: str
    rule: Json  # of the order of samples: the manifest's sampler without what moves from step to step
    drawn: int  # samples consumed by all steps so far
    data_width: int  # ranks that read different samples
    files: dict[str, tuple[int, str]]  # name → (size, crc64nvme)


def read_chain(objects: Objects) -> list[Link]:
    """All links, oldest first; raises BrokenChainError."""
    point = _latest(objects)
    links: list[Link] = []
    while point is not None:
        manifest = _manifest(objects, point)
        links.append(_link(point, manifest))
        if len(links) > 1 and links[-1].step >= links[-2].step:
            raise BrokenChainError(f"{links[-2].folder} has a parent that is not older: {links[-1].folder}")
        point = manifest["parent"]
    return links[::-1]


def latest_pointer(objects: Objects) -> Json:
    """``latest``; in a folder it is the one with the highest number. Raises BrokenChainError where there is none."""
    versions = {
        int(found[1] or 0): key for key in objects.names() if (found := re.fullmatch(r"latest(?:\.(\d+))?", key))
    }
    if not versions:
        raise BrokenChainError("there is no latest: nothing was committed")
    return dict(json.loads(objects.read(versions[max(versions)])))


def _latest(objects: Objects) -> Json:
    """What ``latest`` points at."""
    point = latest_pointer(objects)["point"]
    if point is None:
        raise BrokenChainError("latest points at no state: nothing was committed")
    return dict(point)


def _manifest(objects: Objects, point: Json) -> Json:
    try:
        content = objects.read(point["manifest"])
    except KeyError:
        raise BrokenChainError(
            f"{point['manifest']} is gone; to check a whole run, set checkpoint.keep.last to more than it saves"
        ) from None
    if hashlib.sha256(content).hexdigest() != point["sha256"]:
        raise BrokenChainError(f"{point['manifest']} is not the one that was committed: its checksum differs")
    return dict(json.loads(content))


def _link(point: Json, manifest: Json) -> Link:
    state, sampler = manifest["state"], dict(manifest["sampler"])
    del sampler["steps"]
    return Link(
        step=state["step"],
        epoch=state["epoch"],
        generation=state["generation"],
        folder=point["manifest"].rpartition("/")[0],
        drawn=sampler.pop("drawn"),
        rule=sampler,
        data_width=manifest["layout"]["data_width"],
        files={file["name"]: (file["size"], file["crc64nvme"]) for file in manifest["files"]},
    )
