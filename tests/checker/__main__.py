"""``python -m checker URI [--steps N] [--endpoint URL]``: exit status 0 if the run is exact, 1 if not."""

from __future__ import annotations

import argparse
import sys

from checker.check import check
from checker.stores import open_uri


def main() -> int:
    """Checks one run."""
    parser = argparse.ArgumentParser(prog="checker", description=__doc__)
    parser.add_argument("uri", help="<checkpoint.uri>/<namespace>/<job>/<uid>: s3://…, file:///… or a path")
    parser.add_argument("--steps", type=int, help="how many steps the run was to do")
    parser.add_argument("--endpoint", help="URL of the S3 server")
    arguments = parser.parse_args()
    verdict = check(open_uri(arguments.uri, arguments.endpoint), steps=arguments.steps)
    print(verdict)
    return 0 if verdict.exact else 1


if __name__ == "__main__":
    sys.exit(main())
