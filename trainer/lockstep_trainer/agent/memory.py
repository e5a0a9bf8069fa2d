"""What the agent keeps in the run folder over its own death, and what it counts there."""

from __future__ import annotations

import logging
import os
import secrets
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from lockstep_trainer.protocol.node import NodeMemory

log = logging.getLogger(__name__)

_MEMORY: TypeAdapter[NodeMemory] = TypeAdapter(NodeMemory)


class Volume:
    """The run folder's small files. It is in memory: a write is a copy, and a node reboot takes it all."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self.boot_id = self._boot_id()
        self.agent_starts = self._count("agent-starts")
        self.container_starts = self._read_count("container-starts") or 1

    def load(self) -> NodeMemory | None:
        """None where this is the first agent of this boot."""
        path = self.run_dir / "agent.json"
        try:
            return _MEMORY.validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except ValidationError as error:
            # Never go on with half a memory: as after a reboot, the operator is asked for a new epoch.
            log.error("%s can't be used, starting as a new boot: %s", path, error.errors()[0]["msg"])
            path.rename(path.with_suffix(".refused"))
            (self.run_dir / "boot-id").unlink()
            self.boot_id = self._boot_id()
            return None

    def save(self, memory: NodeMemory) -> None:
        """Replace agent.json as a whole."""
        fresh = self.run_dir / ".agent.json"
        fresh.write_bytes(_MEMORY.dump_json(memory))
        os.replace(fresh, self.run_dir / "agent.json")

    def _boot_id(self) -> str:
        path = self.run_dir / "boot-id"
        if not path.exists():
            fresh = self.run_dir / ".boot-id"
            fresh.write_text(secrets.token_hex(8))
            os.replace(fresh, path)
        return path.read_text().strip()

    def _count(self, name: str) -> int:
        count = self._read_count(name) + 1
        fresh = self.run_dir / f".{name}"
        fresh.write_text(str(count))
        os.replace(fresh, self.run_dir / name)
        return count

    def _read_count(self, name: str) -> int:
        try:
            return int((self.run_dir / name).read_text())
        except (FileNotFoundError, ValueError):
            return 0
