"""``python -m crash``: a campaign as long as you like; exits 1 at the first thing that must not be.

    PYTHONPATH=tests python -m crash --rounds 300 --seed 7 --write

Prints a line per round and the sums; with --write, these go into docs/results/crash.json behind those of campaigns
before, anew at the end of each job: a long campaign may be done in pieces with a seed each. The folder with the jobs'
last files and the journal, ``campaign.jsonl``, is kept where something was found.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from crash.campaign import campaign
from crash.journal import REPOSITORY, table
from s3server import S3Server

RESULT = REPOSITORY / "docs/results/crash.json"


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="crash", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=300, help="default 300")
    parser.add_argument("--seed", type=int, default=1, help="default 1")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no job after that; default: no end")
    parser.add_argument("--write", action="store_true", help="add to docs/results/crash.json")
    parser.add_argument("--keep", action="store_true", help="keep the folder")
    arguments = parser.parse_args()
    console = Console(highlight=False, markup=False, soft_wrap=True)
    folder = Path(tempfile.mkdtemp(prefix="crash-"))
    before = json.loads(RESULT.read_text()) if RESULT.exists() else []

    def keep(result: dict[str, Any]) -> None:
        if arguments.write:
            RESULT.write_text(json.dumps([*before, result], indent=1, ensure_ascii=False) + "\n")

    try:
        with S3Server(folder / "server") as server:
            result, journal = campaign(
                folder,
                server,
                rounds=arguments.rounds,
                seed=arguments.seed,
                seconds=60 * arguments.minutes,
                say=console.print,
                keep=keep,
            )
    except AssertionError as error:
        console.print(f"{error}\nkept: {folder}")
        return 1
    console.print(table(result))
    if arguments.write:
        console.print(f"written to {RESULT.relative_to(REPOSITORY)}")
    if arguments.keep:
        console.print(f"journal: {journal}")
    else:
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
