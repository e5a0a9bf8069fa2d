"""The results as a page of the documentation."""

from __future__ import annotations

import math
from collections.abc import Sequence

from parity.cases import SAMPLES, STEPS
from parity.run import LIMITS, MIXTURES_IN_BF16, Result

_HEAD = f"""# Parity

Written by `make parity`; `make parity ARGS=NAME` runs one cell, `make parity ARGS=--list` names them.

Each row is one composition of parallelisms, trained for {STEPS} steps of the optimizer on {SAMPLES} samples with
unequal numbers of targets, clipped, and compared with a single process in float64. Errors are relative and rounded up
to a power of ten: of the loss and of the gradient's norm the largest over the steps, of the gradients (first step) and
of the parameters (after the last step) the largest over all names, each ‖difference‖ / ‖reference‖. The limit is
{LIMITS["fp64"]["gradient"]:.0e}; rows in fp32 and bf16 run the default kernels and have limits of their own
({LIMITS["fp32"]["gradient"]:.0e} and {LIMITS["bf16"]["gradient"]:.0e} for gradients; {MIXTURES_IN_BF16:.0e} where
bf16's rounding may send tokens to other experts, as it does in a single process).

Names: model, then degrees above 1 of r(eplicate), s(hard), t(ensor), p(ipeline), c(ontext), e(xpert), then the options.

| Cell | Ranks | Loss | Norm | Gradients | Parameters |
|---|---|---|---|---|---|
"""

_COLUMNS = ("loss", "norm", "gradient", "parameter")


def render(results: Sequence[Result]) -> str:
    """The page."""
    rows = []
    for result in results:
        judged = LIMITS[result.case.precision]
        errors = [_rounded(result.errors[kind]) if kind in judged else "–" for kind in _COLUMNS]
        rows.append(f"| {result.case.name} | {result.case.layout.world_size} | {' | '.join(errors)} |\n")
    return _HEAD + "".join(rows)


def _rounded(error: float | str) -> str:
    assert isinstance(error, float)
    return "0" if error == 0 else f"1e{math.ceil(math.log10(error))}"
