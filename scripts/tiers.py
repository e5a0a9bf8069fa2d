"""`make test`: the tests in tiers, quickest first, with the time that each took.

    python scripts/tiers.py                   all tiers
    python scripts/tiers.py static unit       some of them
    python scripts/tiers.py run -- -k hang    the rest goes to pytest

A tier is a list of commands. All tiers run even when an early one fails; the exit status is 1 if any did.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

REPOSITORY = Path(__file__).resolve().parents[1]
REPORTS = REPOSITORY / "build/tests"
PYTHON = sys.executable


@dataclass(frozen=True, slots=True)
class Tier:
    """Commands that are run one after another, and folders of tests that are run after them."""

    name: str
    title: str
    commands: tuple[tuple[str, ...], ...] = ()
    tests: tuple[str, ...] = ()
    processes: int = 1  # that share the tests, a file each; where tests have no machine-wide part
    root: bool = False  # needs root on Linux: namespaces, mounts and cgroups of the local cluster


TIERS = (
    Tier(
        "static",
        "style, types, import contracts, generated files",
        commands=(
            ("ruff", "check"),
            ("ruff", "format", "--check"),
            ("mypy",),
            ("lint-imports", "--no-logo"),
            (PYTHON, "scripts/generate.py", "--check"),
        ),
    ),
    Tier(
        "unit",
        "units, simulation, chart",
        commands=((PYTHON, "-m", "localcluster", "build", "helm", "versitygw"),),  # a real Helm and a real S3 server
        tests=("tests/unit", "tests/simulation", "tests/checker"),
        processes=2,
    ),
    Tier(
        "parity",
        "every parallelism against a single process, learning against transformers",
        tests=("tests/parity", "tests/learning"),
    ),
    Tier(
        "api",
        "against a real API server",
        commands=((PYTHON, "-m", "localcluster", "build", "etcd", "kubernetes"),),  # on a bare machine: minutes
        tests=("tests/integration/api",),
        root=True,
    ),
    Tier(
        "run",
        "local runs through faults",
        commands=((PYTHON, "-m", "localcluster", "build", "versitygw"),),
        tests=("tests/integration/agent", "tests/integration/run", "tests/crash"),
    ),
    Tier(
        "cluster",
        "on a real cluster, with images, chart and faults",
        commands=(
            (PYTHON, "-m", "localcluster", "build"),
            *(
                (PYTHON, "-m", "localcluster", "image-build", f"images/{name}.Dockerfile", f"lockstep-{name}:dev")
                for name in ("operator", "trainer")  # the tags are those of demonstration.target
            ),
        ),
        tests=("tests/e2e",),
        root=True,
    ),
    Tier(
        "docs", "documentation", commands=((PYTHON, "-m", "sphinx", "-W", "--keep-going", "-q", "docs", "build/docs"),)
    ),
)


@dataclass(slots=True)
class Outcome:
    """What became of a tier."""

    tier: Tier
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)
    counts: str = ""  # of tests, as pytest counts them


def clock(seconds: float) -> str:
    """``65`` → ``1:05``."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def execute(command: Sequence[str]) -> int:
    """Run a command with its output shown. Tools are those of this environment, not of PATH."""
    own_tools = f"{Path(PYTHON).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    # Several ranks share the cores: more threads than that only fight each other.
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PATH": own_tools}
    return subprocess.run(command, cwd=REPOSITORY, env=environment, stdin=subprocess.DEVNULL, check=False).returncode


def count_tests(report: Path) -> str:
    """``12 passed, 1 skipped`` from pytest's JUnit report; empty where there is none."""
    if not report.exists():
        return ""
    suites = ElementTree.parse(report).getroot().iter("testsuite")
    totals = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    for suite in suites:
        for name in totals:
            totals[name] += int(suite.get(name, 0))
    failed = totals["failures"] + totals["errors"]
    parts = {"passed": totals["tests"] - failed - totals["skipped"], "failed": failed, "skipped": totals["skipped"]}
    return ", ".join(f"{number} {word}" for word, number in parts.items() if number)


def pytest_command(tests: Sequence[str], report: Path, *, marker: str, extra: Sequence[str] = ()) -> list[str]:
    """pytest on some folders or files, with a report for `count_tests`."""
    return [
        *(PYTHON, "-m", "pytest", "--no-header", "-m", marker, "-ra", "--durations=5", "--durations-min=1"),
        *(f"--junitxml={report}", *tests, *extra),
    ]  # fmt: skip


def run_tier(tier: Tier, began: float, extra: Sequence[str]) -> Outcome:
    """Run one tier to its end and say what happened."""
    outcome = Outcome(tier)
    print(f"\n━━ {tier.name}: {tier.title}  [{clock(time.monotonic() - began)}]", flush=True)
    started = time.monotonic()
    if tier.root and (sys.platform != "linux" or os.geteuid() != 0):
        outcome.failures.append("needs root on Linux, for the local cluster")
        print(f"   {outcome.failures[0]}; `make test TIERS='static unit run docs'` runs the others", flush=True)
        return outcome
    commands = [list(command) for command in tier.commands]
    report = REPORTS / f"{tier.name}.xml"
    report.unlink(missing_ok=True)
    if missing := [folder for folder in tier.tests if not (REPOSITORY / folder).is_dir()]:
        outcome.failures.append(f"no such folder: {', '.join(missing)}")
    elif tier.tests:
        shared = ("-n", str(tier.processes), "--dist", "loadfile") if tier.processes > 1 else ()
        commands.append(pytest_command(tier.tests, report, marker="not slow", extra=(*shared, *extra)))
    for command in commands:
        shown = " ".join(Path(part).name if part == PYTHON else part for part in command)
        print(f"── {shown}  [{clock(time.monotonic() - began)}]", flush=True)
        if status := execute(command):
            outcome.failures.append(f"`{shown}` exited with {status}")
            print(f"   FAILED: {outcome.failures[-1]}", flush=True)
    outcome.seconds = time.monotonic() - started
    outcome.counts = count_tests(report)
    return outcome


def summarise(outcomes: Sequence[Outcome]) -> None:
    """The last thing on the screen: minutes per tier, what passed, what failed."""
    print("\n━━ minutes per tier", flush=True)
    for outcome in outcomes:
        verdict = "FAILED" if outcome.failures else "ok"
        print(f"   {outcome.tier.name:8} {clock(outcome.seconds):>6}  {verdict:7} {outcome.counts}")
        for failure in outcome.failures:
            print(f"            {failure}")
    print(f"   {'all':8} {clock(sum(outcome.seconds for outcome in outcomes)):>6}", flush=True)


def main() -> int:
    """Command line; 1 when a tier failed, 130 on Ctrl-C."""
    names = [tier.name for tier in TIERS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tiers", nargs="*", metavar="TIER", help=f"any of: {', '.join(names)}")
    arguments = sys.argv[1:]
    position = arguments.index("--") if "--" in arguments else len(arguments)
    extra = arguments[position + 1 :]
    wanted = parser.parse_args(arguments[:position]).tiers or names
    if unknown := set(wanted) - set(names):
        parser.error(f"no tier {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    REPORTS.mkdir(parents=True, exist_ok=True)
    began, outcomes = time.monotonic(), list[Outcome]()
    try:
        for tier in TIERS:
            if tier.name in wanted:
                outcomes.append(run_tier(tier, began, extra))
    except KeyboardInterrupt:
        return 130
    finally:
        summarise(outcomes)
    return 1 if any(outcome.failures for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
