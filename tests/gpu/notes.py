"""What a check has found so far."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def keep(folder: Path, check: str, found: Mapping[str, Any]) -> None:
    """Write it down, in place of what the check has kept before: so much is left when it is cut off or fails."""
    (folder / f"{check}.json").write_text(json.dumps(found))
