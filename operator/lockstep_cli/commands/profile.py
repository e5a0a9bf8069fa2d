"""``lockstep profile JOB``: traces of steps of chosen ranks, and snapshots of their GPU memory, while they train."""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lockstep_cli import target
from lockstep_cli.errors import CliError
from lockstep_cli.output import Output

if TYPE_CHECKING:
    from lockstep_cli.agents import Agents

_POLL_SECONDS = 0.5
_VIEWERS = {
    "trace": "https://ui.perfetto.dev or chrome://tracing",
    "memory": "https://docs.pytorch.org/memory_viz",
}


def register(commands: argparse._SubParsersAction[Any]) -> argparse.ArgumentParser:
    """Adds the command."""
    parser: argparse.ArgumentParser = commands.add_parser("profile", help="trace some steps of a running job")
    target.add_arguments(parser)
    parser.add_argument("--ranks", default="0", metavar="0,3-5", help="ranks to trace (default: 0)")
    parser.add_argument("--steps", type=int, default=3, metavar="N", help="steps of the trace (default: 3)")
    parser.add_argument("--memory", action="store_true", help="also record allocations of GPU memory")
    parser.add_argument("--output-dir", type=Path, metavar="DIR", help="where files go (default: profile-JOB-TIME)")
    parser.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS", help="give up then (default: 600)")
    parser.set_defaults(handler=handle)
    return parser


def handle(arguments: argparse.Namespace, output: Output) -> int:
    """Asks, waits, downloads, and says where the files are."""
    ranks = parse_ranks(arguments.ranks)
    saved = asyncio.run(_profile(arguments, ranks, output))
    lines = [f"{path}  ({_size(path.stat().st_size)})" for path in saved]
    kinds = dict.fromkeys(path.name.partition("-")[0] for path in saved)
    lines += [f"open {kind} files in {_VIEWERS[kind]}" for kind in kinds]
    output.result({"files": [str(path) for path in saved]}, "\n".join(lines))
    return 0


def parse_ranks(text: str) -> list[int]:
    """``0,3-5`` is 0, 3, 4, 5; raises CliError."""
    ranks: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()) or (dash and int(last) < int(first)):
            raise CliError(f"--ranks {text}: {part.strip()!r} is no rank; write for example 0,3 or 0-7")
        ranks += range(int(first), int(last or first) + 1)
    return sorted(set(ranks))


@dataclass
class _Profile:
    """One rank's."""

    rank: int
    id: str
    status: dict[str, Any] = field(default_factory=lambda: {"state": "waiting", "message": "", "files": []})

    @property
    def path(self) -> str:
        return f"/v1/workers/{self.rank}/profiles/{self.id}"

    def describe(self) -> str:
        state = self.status["state"]
        if state == "running":
            return f"rank {self.rank}: recording steps {self.status['first_step']} to {self.status['last_step']}"
        waits = {"waiting": "waiting for the next step", "writing": "writing the trace", "done": "recorded"}
        return f"rank {self.rank}: {waits.get(state, state)}"


async def _profile(arguments: argparse.Namespace, ranks: list[int], output: Output) -> list[Path]:
    from lockstep_cli import agents

    async with agents.connect(arguments) as connected:
        size = connected.job.spec.nodes * connected.job.spec.gpus_per_node
        if ranks[-1] >= size:
            raise CliError(f"--ranks {arguments.ranks}: {connected.job.name} has the ranks 0 to {size - 1}")
        wanted = {"steps": arguments.steps, "trace": True, "memory": arguments.memory}
        asked: list[_Profile] = []
        try:
            for rank in ranks:
                answer = await connected.ask("POST", rank, f"/v1/workers/{rank}/profiles", wanted)
                asked.append(_Profile(rank, answer["id"]))
            await _wait(connected, asked, time.monotonic() + arguments.timeout, output.note)
            folder = arguments.output_dir or Path(
                f"profile-{connected.job.name}-{time.strftime('%Y%m%d-%H%M%S', time.localtime())}"
            )
            return await _download(connected, asked, folder, output.note)
        finally:
            for profile in asked:  # also what was only asked for: files of a worker take up its pod's memory
                with suppress(CliError):
                    await connected.ask("DELETE", profile.rank, profile.path)


async def _wait(agents: Agents, asked: list[_Profile], deadline: float, note: Callable[[str], None]) -> None:
    said: dict[int, str] = {}
    while True:
        for profile in asked:
            if profile.status["state"] != "done":
                profile.status = await agents.ask("GET", profile.rank, profile.path)
            if profile.status["state"] not in ("waiting", "running", "writing", "done"):
                raise CliError(f"rank {profile.rank}: {profile.status['message'] or profile.status['state']}")
            if said.get(profile.rank) != (line := profile.describe()):
                said[profile.rank] = line
                note(line)
        if all(profile.status["state"] == "done" for profile in asked):
            return
        if time.monotonic() > deadline:
            slow = next(profile for profile in asked if profile.status["state"] != "done")
            raise CliError(f"--timeout: {slow.describe()}; give it more seconds, or see `lockstep status`")
        await asyncio.sleep(_POLL_SECONDS)  # the agent has nothing to wait on either: it looks at the worker's files


async def _download(agents: Agents, asked: list[_Profile], folder: Path, note: Callable[[str], None]) -> list[Path]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CliError(f"--output-dir {folder}: can't be made: {error.strerror}") from None
    saved: list[Path] = []
    for profile in asked:
        for file in profile.status["files"]:
            path = folder / file["name"]
            progress = _Progress(file["name"], file["bytes"], note)
            await agents.download(profile.rank, f"{profile.path}/{file['name']}", path, progress)
            saved.append(path)
    return saved


class _Progress:
    """A line at the start, and one at each further quarter of a large file."""

    def __init__(self, name: str, total: int, note: Callable[[str], None]) -> None:
        self._name, self._total, self._note = name, total, note
        self._next = 0.25
        note(f"downloading {name}, {_size(total)}")

    def __call__(self, received: int) -> None:
        share = received / max(1, self._total)
        if self._total >= 4 << 20 and share >= self._next:
            self._note(f"downloading {self._name}: {share:.0%}")
            self._next = share // 0.25 * 0.25 + 0.25


def _size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.0f} KiB"
