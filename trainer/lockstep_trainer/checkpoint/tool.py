"""``python -m lockstep_trainer.checkpoint.tool``: what of ``lockstep checkpoint`` needs torch, in a process of its own.

Reads one request from standard input (``Request``, JSON) and writes JSON lines to standard output: ``{"total": bytes}``
and ``{"done": bytes}`` on the way, at last ``{"result": {…}}`` or ``{"error": sentence}``. Exit status 0 in all these
cases; anything else is a defect.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from lockstep_api.v1alpha1 import S3Spec, TrainerSpec

_PAUSE = 0.1  # seconds between two lines about progress


class Request(BaseModel):
    """What is to be done. ``uri`` is the job's prefix."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    do: Literal["verify", "export"]
    uri: str
    s3: S3Spec
    folders: tuple[str, ...]
    """Step folders on the chain; export takes one."""
    trainer: TrainerSpec | None = None
    """Of the job; export needs it where the manifest does not say what the model is."""
    to: str | None = None
    tokenizer: str | None = None
    """URI, in place of the one that ``trainer`` names."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    force: bool = False
    """Whether export replaces what it finds in ``to``."""


def main() -> int:
    """Does what standard input asks for."""
    request = Request.model_validate_json(sys.stdin.read())
    try:
        import torch  # noqa: F401 (the only package that this may lack)
    except ModuleNotFoundError:
        how = "`make setup` in Lockstep's repository, or pip install '.[trainer]' there"
        _say(error=f"{request.do} needs torch; install the trainer's packages: {how}")
        return 0
    from lockstep_trainer.errors import TrainerError

    try:
        _say(result=answer(request, _say))
    except TrainerError as error:
        _say(error=str(error))
    return 0


def answer(request: Request, say: Callable[..., None]) -> dict[str, Any]:
    """The result; ``say`` gets the progress. Raises TrainerError."""
    progress = _Progress(say)
    return _verify(request, progress) if request.do == "verify" else _export(request, progress)


class _Progress:
    """Says how many bytes were read, some times a second."""

    def __init__(self, say: Callable[..., None]) -> None:
        self._say, self._done, self._said = say, 0, 0.0

    def began(self, total: int) -> None:
        self._say(total=total)

    def read(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if now - self._said >= _PAUSE:
            self._said = now
            self._say(done=self._done)


def _verify(request: Request, progress: _Progress) -> dict[str, Any]:
    from lockstep_trainer.checkpoint.catalogue import read_job
    from lockstep_trainer.checkpoint.manifest import MANIFEST
    from lockstep_trainer.checkpoint.verify import verify
    from lockstep_trainer.storage import open_store

    job = read_job(open_store(request.uri, request.s3))
    chosen = [job.find(folder) for folder in request.folders]
    progress.began(sum(each.manifest.size for each in chosen if each.manifest))
    found = []
    for each in chosen:
        if each.manifest is None:
            problems = [{"file": MANIFEST, "message": f"it {each.problem.removeprefix(f'{MANIFEST} ')}"}]
        else:
            met = verify(job.chain.store, each.manifest, progress.read, request.s3)
            problems = [{"file": problem.file, "message": problem.message} for problem in met]
        files = len(each.manifest.files) if each.manifest else 0
        size = each.manifest.size if each.manifest else 0
        found.append({"folder": each.folder, "files": files, "bytes": size, "problems": problems})
    return {"checkpoints": found}


def _export(request: Request, progress: _Progress) -> dict[str, Any]:
    import torch

    from lockstep_trainer.checkpoint.catalogue import read_job
    from lockstep_trainer.checkpoint.export import export
    from lockstep_trainer.errors import Corrupt, UserError
    from lockstep_trainer.model.files import present
    from lockstep_trainer.storage import open_store

    assert request.to is not None
    to = open_store(request.to, request.s3)
    if not request.force and (there := present(to)):
        raise UserError(
            f"--to: {to.uri} has {', '.join(there[:3])} already; name another folder, or add --force to replace the "
            "model that is there"
        )
    job = read_job(open_store(request.uri, request.s3))
    (chosen,) = (job.find(folder) for folder in request.folders)
    if chosen.manifest is None:
        raise Corrupt(chosen.problem or f"{chosen.folder} is off the chain: nothing says what should be in it")
    ordered = request.trainer.tokenizer.uri if request.trainer else None
    config = export(
        job.chain.store,
        chosen.manifest,
        request.trainer,
        request.s3,
        to,
        tokenizer=request.tokenizer or ordered,
        tokenizer_field="--tokenizer" if request.tokenizer else "trainer.tokenizer.uri",
        dtype=getattr(torch, request.dtype),
        began=progress.began,
        read=progress.read,
    )
    return {"folder": chosen.folder, "to": request.to, "layers": config.layers, "vocabulary": config.vocab_size}


def _say(**line: Any) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
