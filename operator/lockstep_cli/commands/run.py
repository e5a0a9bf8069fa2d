"""``lockstep run FILE``: runs a manifest on this machine, with processes for pods."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import time
import uuid
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any

from rich.live import Live
from rich.text import Text

from lockstep_api.v1alpha1 import Phase, TrainingJob, TrainingJobStatus
from lockstep_cli import interruption, journal, live, manifest, runnable, statustable, store, target
from lockstep_cli.commands import report
from lockstep_cli.errors import CliError, RunFailedError
from lockstep_cli.output import Output

_Run = Callable[..., Coroutine[Any, Any, TrainingJobStatus]]
"""Runs a job to its end."""


def register(commands: argparse._SubParsersAction[Any]) -> argparse.ArgumentParser:
    """Adds the command."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "run", help="run a manifest on this machine, without a cluster"
    )
    parser.add_argument("file", metavar="FILE", help="TrainingJob manifest, - for standard input")
    parser.add_argument(
        "--set", action="append", default=[], metavar="PATH=VALUE",
        help="override a field of spec, for example --set trainer.recipe.steps=50",
    )  # fmt: skip
    parser.add_argument(
        "--workdir", type=Path, help="folder of the run (default: a new one in ~/.local/state/lockstep)"
    )
    parser.add_argument("--report", type=Path, help="where the report goes (default: report.html in the run's folder)")
    parser.add_argument(
        "--fault-injection", action="store_true", help="allow `lockstep inject` to make faults in this run on purpose"
    )
    parser.set_defaults(handler=handle)
    return parser


def handle(arguments: argparse.Namespace, output: Output) -> int:
    """Runs the job to its end."""
    loaded = runnable.checked(manifest.load(arguments.file, arguments.set), arguments.file)
    folder: Path = arguments.workdir or _new_folder(loaded.name)
    run = _local_run()
    job = prepare(loaded, folder)
    output.note(Text.assemble(("run folder", "dim"), f" {folder}"))
    _prefer_own_python()
    _make_importable(arguments.file)
    start = partial(run, job, state_dir=folder, fault_injection=arguments.fault_injection)
    try:
        status = asyncio.run(_run(start, job, output))
    except (KeyboardInterrupt, asyncio.CancelledError, BrokenPipeError):
        if how := interruption.record(folder, time.time()):
            output.errors.print(f"lockstep: {how}", soft_wrap=True)
        raise
    job = job.model_copy(update={"status": status})
    written = _report(job, arguments.report or folder / "report.html", output)
    output.result(_summary(job, folder, written), statustable.table(job, time.time()))
    if written:
        told, path = written
        _say_result(told, path, output)
    if status.phase != Phase.SUCCEEDED:
        raise RunFailedError(_failure(job))
    return 0


def prepare(job: TrainingJob, folder: Path) -> TrainingJob:
    """The job with an identity of its own, and its folder on disk. Raises CliError for a folder that was used, and
    where no folder can be made; then it is not used."""
    if target.is_local(str(folder)):
        raise CliError(
            f"--workdir {folder}: holds another run (`lockstep why {folder}` tells of it); give a new folder, or "
            "remove this one"
        )
    checkpoint = job.spec.checkpoint
    if checkpoint and checkpoint.uri.startswith("file://"):
        _make(store.folder_of(checkpoint.uri), f"checkpoint.uri: {checkpoint.uri}")
    _make(folder, f"--workdir {folder}")
    job = job.model_copy(
        update={"metadata": {**job.metadata, "namespace": job.namespace, "uid": str(uuid.uuid4()), "generation": 1}}
    )
    try:
        (folder / target.JOB_FILE).write_text(json.dumps(job.to_wire(), indent=1) + "\n")
    except OSError as error:
        raise CliError(f"--workdir {folder}: can't be written to ({error.strerror}); give another folder") from None
    return job


def _make(folder: Path, named: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CliError(f"{named}: no folder can be made there ({error.strerror}); give another") from None


def _local_run() -> _Run:
    """What runs a job; raises CliError where the operator's packages are not installed."""
    try:
        from lockstep_operator import local_run
    except ImportError as error:
        raise CliError(f"run: {error}; install lockstep[operator,trainer]") from None
    return local_run.run


def _prefer_own_python() -> None:
    """``python`` in spec.command is the one that has Lockstep and torch, as in the image; unless the user has chosen
    an environment."""
    if "VIRTUAL_ENV" not in os.environ:
        os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"


def _make_importable(file: str) -> None:
    """Modules that the manifest names are looked for beside it and in the working directory too."""
    beside = [] if file == "-" else [str(Path(file).resolve().parent)]
    own = filter(None, os.environ.get("LOCKSTEP_MODULE_PATH", "").split(os.pathsep))
    os.environ["LOCKSTEP_MODULE_PATH"] = os.pathsep.join([*own, *beside, str(Path.cwd())])


async def _run(start: _Run, job: TrainingJob, output: Output) -> TrainingJobStatus:
    task = asyncio.current_task()
    assert task is not None
    # SIGINT cancels through asyncio.run; a supervisor's SIGTERM must clean up as well.
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    started = time.time()
    if not output.live:
        return await _in_lines(start, live.Lines(output.note, started), task)
    history = live.History(started)
    with Live(console=output.console, auto_refresh=False, transient=True) as screen:
        show = _shower(job, history, screen)
        ticker = asyncio.create_task(_tick(show))
        try:
            return await start(on_status=show)
        finally:
            ticker.cancel()


async def _in_lines(start: _Run, lines: live.Lines, task: asyncio.Task[Any]) -> TrainingJobStatus:
    """Runs the job and tells of it in lines. Where nobody reads them any more the job is ended, as by Ctrl-C, and
    BrokenPipeError raised."""
    unread = False

    def show(status: TrainingJobStatus) -> None:
        nonlocal unread
        if unread:
            return
        try:
            lines.show(status, time.time())
        except BrokenPipeError:  # `lockstep run … | head`
            unread = True
            task.cancel()

    try:
        return await start(on_status=show)
    except asyncio.CancelledError:
        if unread:
            raise BrokenPipeError from None
        raise


def _shower(job: TrainingJob, history: live.History, screen: Live) -> Callable[[TrainingJobStatus | None], None]:
    """A function that draws a new status, or (None) the last one with the clock moved on."""
    newest = job.status

    def show(status: TrainingJobStatus | None) -> None:
        nonlocal newest
        if status is not None:
            newest = status
            history.add(status)
        screen.update(live.view(job.model_copy(update={"status": newest}), history, time.time()), refresh=True)

    return show


async def _tick(show: Callable[[None], None]) -> None:
    while True:
        show(None)
        await asyncio.sleep(0.5)


def _report(job: TrainingJob, path: Path, output: Output) -> tuple[journal.Journal, Path] | None:
    if job.spec.checkpoint is None:
        return None
    try:
        return report.write(path, store.run_uri(job), job.spec.checkpoint.s3, job).told, path
    except CliError as error:
        output.errors.print(f"no report: {error}", soft_wrap=True)
        return None


def _say_result(told: journal.Journal, path: Path, output: Output) -> None:
    last = told.evaluations[-1] if told.evaluations else None
    if last and last.bigram_loss is not None:
        gap = last.bigram_loss - last.loss
        word = "below" if gap >= 0 else "above"
        output.note(
            f"held-out loss {last.loss:.3f}: {abs(gap):.2f} nats per token {word} a tuned bigram model "
            f"({last.bigram_loss:.3f})"
        )
    if told.texts and not output.as_json:
        text = told.texts[-1]
        output.console.print("it writes:", style="dim")
        output.console.print(text.prompt + text.text.removeprefix(text.prompt), style="italic")
    output.note(Text.assemble(("report", "dim"), f" {path}"))


def _summary(job: TrainingJob, folder: Path, written: tuple[journal.Journal, Path] | None) -> dict[str, Any]:
    return {
        "job": job.name,
        "uid": job.uid,
        "phase": job.status.phase,
        "folder": str(folder),
        "checkpoints": store.run_uri(job) if job.spec.checkpoint else None,
        "report": str(written[1]) if written else None,
        "status": job.status.to_wire(),
    }


def _failure(job: TrainingJob) -> str:
    failed = next((c for c in job.status.conditions if c.type == "Failed" and c.status == "True"), None)
    return f"{job.name}: {failed.message}" if failed else f"{job.name}: ended as {job.status.phase} without a reason"


def _new_folder(name: str) -> Path:
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    return state / "lockstep" / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
