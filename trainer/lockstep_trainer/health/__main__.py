"""``python -m lockstep_trainer.health``: check this machine, say what is wrong.

Exits 0 where the machine is fit, 1 where a finding is fatal, 2 where it can't be checked.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from lockstep_trainer.errors import UserError
from lockstep_trainer.health.preflight import Tier, check
from lockstep_trainer.health.table import load
from lockstep_trainer.supervisor import raise_open_files

FATAL, NOT_CHECKED = 1, 2


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="lockstep_trainer.health", description=__doc__)
    parser.add_argument("--tier", type=Tier, choices=list(Tier), default=Tier.QUICK, help="default: Quick")
    parser.add_argument("--gpus", type=int, help="how many there should be; on CPUs, ranks of the collectives")
    parser.add_argument("--findings", type=Path, help="a file of rows that change findings.yaml")
    parser.add_argument("--run-dir", type=Path, default=os.environ.get("LOCKSTEP_RUN_DIR"), help="the run folder")
    parser.add_argument("--json", action="store_true", help="one JSON object in place of tables")
    arguments = parser.parse_args()
    run_dir = Path(arguments.run_dir) if arguments.run_dir else None
    raise_open_files()  # as the supervisor does: by hand, and in a Job of `lockstep preflight`, nobody else has
    try:
        report = check(arguments.tier, load(arguments.findings), run_dir=run_dir, gpus=arguments.gpus)
    except UserError as error:
        print(f"health: {error}", file=sys.stderr)
        return NOT_CHECKED
    if arguments.json:
        print(json.dumps(report.to_json()))
    else:
        from rich.console import Console

        from lockstep_trainer.health.show import tables

        # A file or a pipe has no width: lines are left whole there. What a driver says is text, no markup.
        width = None if sys.stdout.isatty() else 400
        Console(highlight=False, markup=False, emoji=False, width=width).print(tables(report), soft_wrap=True)
    return FATAL if report.fatal else 0


if __name__ == "__main__":
    sys.exit(main())
