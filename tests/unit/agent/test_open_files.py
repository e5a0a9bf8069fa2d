"""Container runtimes give 1024 open files and a far higher hard limit: leader and rendezvous store need more."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

GIVEN, HARD = 300, 2000
"""Soft limit and hard one of the container."""
LIMITS = "import os, resource; print(resource.getrlimit(resource.RLIMIT_NOFILE), os.getenv('LOCKSTEP_OPEN_FILES'))"
SUPERVISOR = f"""
import subprocess, sys
from lockstep_trainer import supervisor, zygote
started = [sys.executable, "-c", {LIMITS!r}]
supervisor.Supervisor.run = lambda _: %s
supervisor.main()
"""


def said(tmp_path: Path, *arguments: str) -> str:
    """By a Python as the first process of a container with these limits."""
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "LOCKSTEP_RUN_DIR": str(tmp_path)},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (GIVEN, HARD)),
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout.strip()


def test_what_the_supervisor_starts_may_open_as_many_files_as_the_hard_limit_allows(tmp_path: Path) -> None:
    program = SUPERVISOR % "subprocess.run(started)"
    assert said(tmp_path, "-c", program) == f"({HARD}, {HARD}) {GIVEN}"


def test_a_users_program_has_the_limit_that_the_container_was_given(tmp_path: Path) -> None:
    """It may use select(2), which knows no file beyond 1023."""
    program = SUPERVISOR % "zygote._execute(started, {})"
    assert said(tmp_path, "-c", program) == f"({GIVEN}, {HARD}) None"


def test_checks_without_a_supervisor_judge_what_a_pod_may_open(tmp_path: Path) -> None:
    """By hand, and in the Jobs of `lockstep preflight`."""
    found = json.loads(said(tmp_path, "-m", "lockstep_trainer.health", "--json"))
    assert found["readings"]["host"]["open_files"] == HARD
