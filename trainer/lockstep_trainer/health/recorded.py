"""NVML's answers out of a file: for tests, and to see what a finding does to a job before there is one.

The file holds one GPU as an object, question → answer, or several as a list. An answer ``{"error": …}`` is a refusal,
by the name of pynvml's exception; a question that is not there has no answer. Under ``*`` stands what every question
is answered with: that of a GPU that is lost. ``Xids`` are the errors that a listener hears.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lockstep_trainer.errors import UserError
from lockstep_trainer.health.nvml import Refused
from lockstep_trainer.health.readings import Xid


@dataclass(frozen=True, slots=True)
class RecordedNvml:
    """Replays; see Nvml."""

    gpus: tuple[dict[str, Any], ...]

    @classmethod
    def read(cls, path: Path) -> RecordedNvml:
        """Raises UserError that names the file."""
        try:
            raw = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{path} (LOCKSTEP_NVML_ANSWERS) can't be read as JSON: {error}") from None
        gpus = raw if isinstance(raw, list) else [raw]
        if not all(isinstance(gpu, dict) for gpu in gpus):
            raise UserError(f"{path} (LOCKSTEP_NVML_ANSWERS) must hold an object, question → answer, or a list of them")
        return cls(tuple(gpus))

    def count(self) -> int:
        """As many as were recorded."""
        return len(self.gpus)

    def ask(self, gpu: int, question: str) -> Any:
        """The recorded answer."""
        answers = self.gpus[gpu]
        answer = answers.get("*", answers.get(question, {"error": "NVMLError_NotSupported"}))
        if isinstance(answer, dict) and "error" in answer:
            raise Refused(str(answer["error"]).removeprefix("NVMLError_"), answer.get("says", ""))
        return answer

    @contextmanager
    def listen(self) -> Iterator[RecordedNvml]:
        """Hears what was recorded."""
        yield self

    def heard(self) -> list[Xid]:
        """The recorded errors."""
        return [Xid(index, code) for index, gpu in enumerate(self.gpus) for code in gpu.get("Xids", ())]
