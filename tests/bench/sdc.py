"""Silent data corruption: bits flipped on 8 ranks, and which of them ring replay finds.

    python tests/bench/sdc.py [--each 84] [--layouts dp8,dp4-tp2] [--parts trials,delays,clean,cost]
        [--kinds sampled,update] [--minutes 30] [--state build/sdc.jsonl] [--write]

trials: ``--each`` faults of every layout, by seed over sites, bits, layers, ranks and rates, on steps that are all
replayed, and some of each other kind (`corruption.trial`): in memory, in updates, out of reach. A rank that is named is
put aside, as the job would do, before the step is computed again. delays: steps until a fault is found when a share of
them is replayed, on four ranks, and over steps that nobody computes (`corruption.virtual`). clean: steps without a
fault. cost: CPU time.

What was done goes into the state file: a run that was stopped goes on from there. With --write the sums go into
docs/results/sdc.json, behind those of runs before, and the picture to docs/results/sdc.svg.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import get_args

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY / each) for each in ("tests", "trainer", "crds")]

import torch  # noqa: E402 - the path comes first
from rich.console import Console  # noqa: E402
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn  # noqa: E402

from bench import results  # noqa: E402
from corruption import clean, costs, virtual  # noqa: E402
from corruption.kept import Kept, What  # noqa: E402
from corruption.picture import draw  # noqa: E402
from corruption.ranks import yielded  # noqa: E402
from corruption.sums import summary, tables  # noqa: E402
from corruption.trial import LAYOUTS, RATES, Kind, Trial, delays, rounds  # noqa: E402
from corruption.world import play  # noqa: E402

PARTS = ("trials", "delays", "clean", "cost")
SEED = 1


class Bench:
    """Does what is not yet in the state file, until time is up."""

    def __init__(self, kept: Kept, seconds: float, folder: Path, say: Callable[[str], None]) -> None:
        """``folder`` is for what ranks print."""
        self.kept, self._folder, self._say = kept, folder, say
        self._end = time.monotonic() + seconds

    def trials(self, worlds: Sequence[list[Trial]]) -> None:
        """World after world."""
        names = [trial.name for world in worlds for trial in world]
        self._counted("trial", names, lambda: self._trials(worlds))

    def clean(self, steps: int) -> None:
        """At least so many steps, of all layouts alike."""
        pieces = -(-steps // (clean.PIECE * len(clean.LAYOUTS)))
        names = [f"{name}/{number}" for name in clean.LAYOUTS for number in range(pieces)]
        self._counted("clean", names, lambda: self._clean(pieces))

    def virtual(self, each: int) -> None:
        """Over steps that nobody computes."""
        names = [f"{share:g}/{rate:g}/{each}" for share in virtual.SHARES for rate in RATES]
        self._counted("virtual", names, lambda: self._virtual(each))

    def cost(self, rounds: int) -> None:
        """CPU time."""
        self._counted("cost", [str(number) for number in range(rounds)], lambda: self._cost(rounds))

    def _trials(self, worlds: Sequence[list[Trial]]) -> Iterator[str]:
        for world in worlds:
            missing = [trial for trial in world if not self.kept.has("trial", trial.name)]
            if not missing:
                continue
            setting = missing[0].setting

            def body(_rank: int, missing: list[Trial] = missing) -> Iterator[dict[str, object]]:
                return play(missing[0].setting, missing)

            for found in yielded(setting.layout.world_size, body, self._folder):
                self.kept.add("trial", found["name"], found)
                yield found["name"]

    def _clean(self, pieces: int) -> Iterator[str]:
        for start in range(0, pieces, 5):
            for name, setting in clean.LAYOUTS.items():
                numbers = range(start, min(start + 5, pieces))
                missing = [number for number in numbers if not self.kept.has("clean", f"{name}/{number}")]
                if not missing:
                    continue

                def body(_rank: int, name: str = name, missing: list[int] = missing) -> Iterator[dict[str, object]]:
                    return clean.train(clean.LAYOUTS[name], missing)

                for found in yielded(setting.layout.world_size, body, self._folder):
                    self.kept.add("clean", f"{name}/{found['piece']}", {"layout": name, **found})
                    yield f"{name}/{found['piece']}"

    def _virtual(self, each: int) -> Iterator[str]:
        for share in virtual.SHARES:
            for rate in RATES:
                name = f"{share:g}/{rate:g}/{each}"
                if not self.kept.has("virtual", name):
                    steps = [virtual.steps_until_found(seed, share, rate) for seed in range(each)]
                    self.kept.add("virtual", name, {"share": share, "rate": rate, "steps": steps})
                    yield name

    def _cost(self, rounds: int) -> Iterator[str]:
        done = len(self.kept.all("cost"))
        if done < rounds:
            for found in yielded(2, lambda _rank: costs.measure(rounds - done), self._folder):
                name = str(done + found["round"])
                self.kept.add("cost", name, found)
                yield name

    def _counted(self, what: What, names: list[str], work: Callable[[], Iterator[str]]) -> None:
        """With a bar; stops when time is up."""
        columns = (TextColumn("{task.description:>8}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        # Without a thread of its own: ranks are forked from this process.
        with Progress(*columns, TextColumn("{task.fields[last]}"), auto_refresh=False) as progress:
            done = sum(self.kept.has(what, name) for name in names)
            bar = progress.add_task(what, total=len(names), completed=done, last="")
            doing = work()
            try:
                while time.monotonic() < self._end:
                    last = next(doing, None)
                    if last is None:
                        break
                    progress.update(bar, advance=1, last=last)
                    progress.refresh()
            except RuntimeError as error:
                self._say(f"{what}: {error}")
            finally:
                doing.close()  # type: ignore[attr-defined]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--each", type=int, default=84, help="faults within reach of every layout; default 84")
    parser.add_argument("--beyond", type=int, default=4, help="of each other kind, of every layout; default 4")
    parser.add_argument("--kinds", default=",".join(get_args(Kind)), help="of trials; default: all")
    parser.add_argument("--delays", type=int, default=20, help="of each share and rate; default 20")
    parser.add_argument("--steps", type=int, default=10_000, help="without a fault; default 10000")
    parser.add_argument("--rounds", type=int, default=10, help="of the cost; default 10")
    parser.add_argument("--layouts", default=",".join(LAYOUTS), help="default: all")
    parser.add_argument("--parts", default=",".join(PARTS), help="default: all; what was done before counts anyway")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after that")
    parser.add_argument("--state", type=Path, default=REPOSITORY / "build/sdc.jsonl", help="what has been done")
    parser.add_argument("--write", action="store_true", help="add to docs/results/sdc.json")
    arguments = parser.parse_args()
    layouts, parts = arguments.layouts.split(","), arguments.parts.split(",")
    kinds = arguments.kinds.split(",")
    known_options = (
        (layouts, tuple(LAYOUTS), "--layouts"), (parts, PARTS, "--parts"), (kinds, get_args(Kind), "--kinds"),
    )  # fmt: skip
    for given, known, option in known_options:
        for name in given:
            if name and name not in known:
                parser.error(f"argument {option}: there is no {name!r}; there are {', '.join(known)}")
    console = Console(width=140, markup=False)  # errors have brackets of their own
    kept = Kept(arguments.state)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(kept, 60 * arguments.minutes, Path(folder), console.print)
        if "cost" in parts:
            bench.cost(arguments.rounds)
        if "delays" in parts:
            bench.virtual(300)
        if "trials" in parts:
            worlds = rounds(arguments.each, arguments.beyond, SEED, layouts)
            bench.trials([[trial for trial in world if trial.kind in kinds] for world in worlds])
        if "delays" in parts:
            bench.trials(list(delays(arguments.delays, SEED)))
        if "clean" in parts:
            bench.clean(arguments.steps)
    for table in tables(kept):
        console.print(table)
    if arguments.write:
        what = "bits flipped on 8 ranks, and which of them ring replay finds"
        head = results.origin(what, f"torch {torch.__version__}, CPU, gloo")
        results.add({**head, "seed": SEED, **summary(kept)}, results.RESULTS / "sdc.json")
        draw(kept, results.RESULTS / "sdc.svg")


if __name__ == "__main__":
    main()
