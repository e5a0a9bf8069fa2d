"""Drives `lockstep run` from tests and benchmarks: starts it, watches it, kills chosen parts of it."""

from localrun.run import LocalRun, Result
from localrun.victims import Victim

__all__ = ["LocalRun", "Result", "Victim"]
