"""Why parameters stay gathered through a pipeline's step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn
from torch.distributed.fsdp import fully_shard

from parity.cases import Case, layout
from parity.run import Runner


@pytest.mark.parametrize("schedule", ["InterleavedZeroBubble", "DualPipeV"])
def test_a_split_backward_loses_gradients_of_parameters_that_were_given_back(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, schedule: str
) -> None:
    """torch (2.11 to 2.15) says nothing. Once this test fails, ``shard_part`` may give parameters back."""

    def giving_back(module: nn.Module, **options: Any) -> object:
        return fully_shard(module, **{**options, "reshard_after_forward": True})

    monkeypatch.setattr("lockstep_trainer.parallel.sharded.fully_shard", giving_back)
    case = Case("llama", layout(schedule, shard=2, pipeline=2))
    runner = Runner([case], tmp_path)
    try:
        failure = runner.result(case).failure
    finally:
        runner.close()
    assert "gradient error" in failure or "elements are held" in failure
