"""``python -m parity``: cells of the matrix by hand.

What has passed in the whole matrix on the same source is not run again: a run of an hour can be stopped and gone on
with.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from parity.cases import covering, full
from parity.journal import Journal
from parity.run import Runner
from parity.table import render

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "parity.md"


def main() -> int:
    """Run what the arguments name; 1 where a cell failed."""
    parser = argparse.ArgumentParser(prog="python -m parity", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="cells, or the beginnings of their names")
    parser.add_argument("--list", action="store_true", help="print the names; those that CI runs have a *")
    parser.add_argument("--full", action="store_true", help="the whole matrix instead of what CI runs")
    parser.add_argument("--write", action="store_true", help=f"write the results to {PAGE.name}")
    parser.add_argument("--ranks", type=int, help="processes at once (16, or 4 for each core)")
    options = parser.parse_args()
    in_ci = {case.name for case in covering()}
    cases = full()
    if options.list:
        print(*(f"{'*' if case.name in in_ci else ' '} {case.name}" for case in cases), sep="\n")
        return 0
    if options.names:
        exact = [case for case in cases if case.name in options.names]
        cases = exact or [case for case in cases if case.name.startswith(tuple(options.names))]
        if not cases:
            print(f"no cell begins with {' or '.join(options.names)}; --list names them", file=sys.stderr)
            return 2
    elif not options.full:
        cases = covering()
    journal = Journal.open() if options.full else Journal(None)
    with tempfile.TemporaryDirectory(prefix="parity-") as folder:
        runner = Runner([case for case in cases if case not in journal], Path(folder), at_once=options.ranks)
        results = []
        try:
            for case in cases:
                result = journal.get(case) or journal.add(runner.result(case))
                results.append(result)
                errors = " ".join(
                    f"{kind} {value:.0e}" for kind, value in result.errors.items() if type(value) is float
                )
                times = f"{result.seconds:5.1f} s, {result.cpu_seconds:5.1f} s of CPU"
                print(f"{'FAILED' if result.failure else 'ok':6} {case.name:50} {times}  {errors}")
                if result.failure:
                    print(result.failure)
                sys.stdout.flush()
        finally:
            runner.close()
    failed = sum(bool(result.failure) for result in results)
    print(f"{len(results) - failed} of {len(results)} cells agree with the single process")
    if options.write and not failed:
        PAGE.write_text(render(results))
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
