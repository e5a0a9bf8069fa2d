"""Everything that a command ends with on purpose.

CliError                     one sentence for the user; exit status 1
├── ManifestError            a manifest can't be read or used; exit status 2
├── NotFoundError            no such job, run, rank or journal
├── ClusterError             the cluster can't be reached or refused the request
└── RunFailedError           the job itself ended without success
"""

from __future__ import annotations


class CliError(Exception):
    """A sentence that names what is wrong and what to do about it."""

    status = 1


class ManifestError(CliError):
    """The manifest is wrong. ``problems`` has one sentence per mistake."""

    status = 2

    def __init__(self, source: str, problems: list[str]) -> None:
        self.source = source
        self.problems = problems
        more = "" if len(problems) == 1 else f" (and {len(problems) - 1} more; see `lockstep validate {source}`)"
        super().__init__(f"{source}: {problems[0]}{more}")


class NotFoundError(CliError):
    """What the user named does not exist."""


class ClusterError(CliError):
    """The cluster did not do what was asked."""


class RunFailedError(CliError):
    """The job ran and failed; the sentence is the job's own."""
