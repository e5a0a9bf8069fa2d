"""`make test-full`: the tests marked slow, file by file; writes a dated result into docs/results/.

What has passed on the same commit with the same uncommitted changes is not run again, so that a run of hours can be
stopped and gone on with.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

import tiers

RESULTS = tiers.REPOSITORY / "docs/results"
STATE = tiers.REPOSITORY / "build/test-full"


@dataclass(frozen=True, slots=True)
class Result:
    """One file's tests."""

    file: str
    passed: bool
    counts: str
    seconds: float
    at: str  # when it ended, UTC


def git(*arguments: str) -> str:
    """Output of a git command."""
    return subprocess.run(["git", *arguments], cwd=tiers.REPOSITORY, check=True, capture_output=True, text=True).stdout


def tree() -> tuple[str, bool]:
    """What is tested: the commit, followed by a hash of uncommitted changes where there are any; and whether."""
    changes = git("diff", "HEAD") + git("status", "--porcelain", "--", ".", ":!docs/results")
    commit = git("rev-parse", "--short=12", "HEAD").strip()
    return (f"{commit}-{hashlib.sha256(changes.encode()).hexdigest()[:8]}", True) if changes else (commit, False)


def slow_files() -> list[str]:
    """Files that hold tests marked slow, in pytest's order."""
    command = [tiers.PYTHON, "-m", "pytest", "--collect-only", "-q", "-m", "slow", "--no-header"]
    listing = subprocess.run(command, cwd=tiers.REPOSITORY, capture_output=True, text=True, check=False)
    if listing.returncode not in (0, 5):  # 5: none found
        raise SystemExit(f"test-full: collecting the tests failed:\n{listing.stdout}{listing.stderr}")
    return list(dict.fromkeys(line.split("::")[0] for line in listing.stdout.splitlines() if "::" in line))


def run(file: str) -> Result:
    """Run one file's slow tests."""
    report = STATE / "report.xml"
    report.unlink(missing_ok=True)
    started = time.monotonic()
    status = tiers.execute(tiers.pytest_command([file], report, marker="slow"))
    ended = datetime.now(UTC).isoformat(timespec="seconds")
    return Result(file, status == 0, tiers.count_tests(report), round(time.monotonic() - started, 1), ended)


def page(name: str, changed: bool, results: list[Result]) -> str:
    """The result as Markdown."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    lines = [
        f"# Long tests at {name.partition('-')[0]}",
        "",
        f"{os.cpu_count()} cores, {memory:.0f} GiB, {platform.system()} {platform.release()}, "
        f"Python {platform.python_version()}." + (" With uncommitted changes." if changed else ""),
        "",
        "| File | Outcome | Tests | Time | Ended |",
        "|---|---|---|---|---|",
    ]
    for result in results:
        outcome = "passed" if result.passed else "**failed**"
        lines.append(f"| {result.file} | {outcome} | {result.counts} | {tiers.clock(result.seconds)} | {result.at} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run what has not passed yet; 1 when a file failed."""
    STATE.mkdir(parents=True, exist_ok=True)
    name, changed = tree()
    record = STATE / f"{name}.json"
    done = {entry["file"]: Result(**entry) for entry in json.loads(record.read_text())} if record.exists() else {}
    files = slow_files()
    if not files:
        print("test-full: no test is marked slow")
        return 1
    for number, file in enumerate(files, start=1):
        if file in done and done[file].passed:
            print(f"━━ {number}/{len(files)} {file}: passed at {done[file].at}", flush=True)
            continue
        print(f"━━ {number}/{len(files)} {file}", flush=True)
        done[file] = run(file)
        record.write_text(json.dumps([asdict(result) for result in done.values()], indent=1))
    results = [done[file] for file in files]
    RESULTS.mkdir(parents=True, exist_ok=True)
    target = RESULTS / f"{datetime.now(UTC):%Y-%m-%d}-{name}.md"
    target.write_text(page(name, changed, results))
    print(f"wrote {target.relative_to(tiers.REPOSITORY)}")
    return 0 if all(result.passed for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
