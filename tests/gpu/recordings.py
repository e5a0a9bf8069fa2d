"""What a real H100 answered to NVML's questions, and what it would answer with a fault (``answers/edits.json``)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).with_name("answers")


def healthy() -> dict[str, Any]:
    """As recorded, by question."""
    found: dict[str, Any] = json.loads((FOLDER / "h100.json").read_text())
    return found


def edited(name: str, index: int = 0) -> dict[str, Any]:
    """With the edit of that name; the GPU at ``index`` of its machine."""
    edit = json.loads((FOLDER / "edits.json").read_text())[name]
    links = {f"NvLinkState {link}": 1 for link in range(edit.get("links", 0))}
    named = {"Serial": f"{index:013}", "UUID": f"GPU-{index:08}-0000-0000-0000-000000000000"}
    return {**healthy(), **named, **links, **edit["changes"]}
