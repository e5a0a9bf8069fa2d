"""Agent, leader and workers: what runs in each pod."""

from __future__ import annotations


def __getattr__(name: str) -> str:
    """``__version__``, looked up when asked for: importlib.metadata costs the supervisor and the agent 60 ms."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("lockstep")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "0"
