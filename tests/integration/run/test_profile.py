"""`lockstep profile` on a run: traces of two ranks in two pods, while it trains."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

from integration.run import small
from localrun import LocalRun

pytestmark = [pytest.mark.run, pytest.mark.timeout(180)]


def profile(run: LocalRun, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lockstep_cli", "profile", str(run.state), "--output", "json", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_traces_of_two_ranks_while_they_train(tmp_path: Path) -> None:
    with LocalRun(tmp_path, small.overrides(100_000, every=1000)) as run:
        run.until_step(5)
        done = profile(run, "--ranks", "0,1", "--steps", "2", "--output-dir", str(tmp_path / "traces"))
        assert done.returncode == 0, done.stderr + run.output()
        files = [Path(file) for file in json.loads(done.stdout)["files"]]
        assert [file.name for file in files] == ["trace-r0.json.gz", "trace-r1.json.gz"]
        for file in files:
            events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
            names = [event.get("name") for event in events]
            assert {"forward", "backward", "optimizer", "aten::mm"} <= set(names)
            assert sum(name == "optimizer" for name in names) == 2
        refused = profile(run, "--memory")
        assert refused.returncode == 1
        assert "a memory snapshot is of CUDA's allocator" in refused.stderr
        step = run.status.progress.step
        status = run.until_step(step + 5)
        assert status.restarts.total == 0  # it trains on
