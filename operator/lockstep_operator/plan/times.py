"""Unix seconds and RFC 3339."""

from __future__ import annotations

from datetime import UTC, datetime


def rfc3339(now: float) -> str:
    """``2026-01-02T03:04:05Z``, whole seconds: what metav1.Time holds."""
    return datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def unix(text: str) -> float:
    """Unix seconds of an RFC 3339 time, fractions included; raises ValueError for another text."""
    return datetime.fromisoformat(text).timestamp()
