"""Agent, leader and workers: what runs in each pod."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("lockstep")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0"
