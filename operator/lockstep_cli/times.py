"""RFC 3339 times, as the API server writes them, and how long ago they were."""

from __future__ import annotations

from datetime import datetime


def parse(text: str) -> float:
    """Unix seconds of an RFC 3339 time."""
    return datetime.fromisoformat(text).timestamp()


def ago(seconds: float) -> str:
    """1.9 s, 42 s, 5 min, 3 h, 2 d: one figure is enough to know how old something is."""
    seconds = max(0.0, seconds)
    if seconds < 10:
        return f"{seconds:.1f} s"
    for limit, unit, name in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds / 86_400:.0f} d"
