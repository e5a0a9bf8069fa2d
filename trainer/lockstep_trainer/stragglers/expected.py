"""How long a rank should compute for what it was given: α·tokens + β·Σ length² + γ.

ResiHP's predictor (arXiv:2605.06374) has α·tokens + β·Σ length²; γ is what does not depend on the batch, such as the
optimizer. The three are fitted per pipeline stage, robustly: a slow rank, a slow step or an outlier changes little.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lockstep_trainer.stragglers.history import Floats, median

_MOST_RANKS = 64
"""Ranks of a stage that are fitted, evenly chosen: more of them add nothing."""
_VARIES = 0.01
"""Coefficient of variation from which a quantity can be told from a constant."""
_TUKEY = 4.685
"""Tukey's biweight at 95 % efficiency for normal noise (Huber and Ronchetti, Robust Statistics, 2009)."""


@dataclass(frozen=True, slots=True)
class Model:
    """Seconds per token, per Σ length², and per step."""

    alpha: float
    beta: float
    gamma: float

    def seconds(self, tokens: Floats, squares: Floats) -> Floats:
        """Expected seconds of compute, in the shape of ``tokens``."""
        return self.alpha * tokens + self.beta * squares + self.gamma


def fit(compute: Floats, tokens: Floats, squares: Floats) -> Model | None:
    """The model for seconds, tokens and Σ length², each [steps, ranks], NaN where a rank was missing.

    None where nothing was computed. What does not vary enough to be told from tokens is left at 0.
    """
    ranks = compute.shape[1]
    if ranks > _MOST_RANKS:
        chosen = np.linspace(0, ranks - 1, _MOST_RANKS).astype(int)
        compute, tokens, squares = compute[:, chosen], tokens[:, chosen], squares[:, chosen]
    known = np.isfinite(compute) & (compute > 0) & (tokens > 0)
    if not known.any():
        return None
    units = np.array([tokens[known].mean(), max(squares[known].mean(), 1e-300), 1.0])
    middle = median(compute[known])
    y = np.where(known, compute / middle, np.nan)
    x = np.stack([tokens / units[0], squares / units[1], np.ones_like(tokens)], axis=-1)
    used = [0]
    if _variation((x[..., 1] / x[..., 0])[known]) > _VARIES:
        used.append(1)
    if _variation(x[..., 0][known]) > _VARIES:
        used.append(2)
    coefficients = _nonnegative(x, y, known, used) * middle / units
    return Model(float(coefficients[0]), float(coefficients[1]), float(coefficients[2]))


def _nonnegative(x: Floats, y: Floats, known: np.ndarray, used: list[int]) -> Floats:
    while True:
        found = _robust(x[..., used], y, known)
        negative = [column for column, value in zip(used, found, strict=True) if value < 0]
        if not negative or len(used) == 1:
            result = np.zeros(x.shape[-1])
            result[used] = np.maximum(found, 0)
            return result
        used = [column for column in used if column != max(negative)]


def _robust(x: Floats, y: Floats, known: np.ndarray) -> Floats:
    """Coefficients of relative least squares, reweighted; factors of ranks and of steps are taken out of ``y``."""
    steps, ranks = y.shape
    weights = known.astype(float)
    adjusted = y
    found = np.zeros(x.shape[-1])
    for round_ in range(8):
        scaled = np.where(known, 1 / np.where(known, adjusted, 1.0), 0.0)
        rows = (x * (scaled * np.sqrt(weights))[..., None])[known]
        normal = rows.T @ rows + 1e-9 * np.eye(x.shape[-1]) * max(float(weights.sum()), 1.0)
        found = np.linalg.solve(normal, rows.T @ np.sqrt(weights[known]))
        predicted = np.maximum(x @ found, 1e-3)
        if round_ == 3 and ranks > 1:
            ratio = np.log(np.where(known, y / predicted, np.nan))
            by_step = _medians(ratio, 1)[:, None] if ranks >= 4 else np.zeros((steps, 1))
            by_rank = _medians(ratio - by_step, 0)[None, :] if steps >= 8 else np.zeros((1, ranks))
            by_rank = by_rank - np.median(by_rank)
            adjusted = y / np.exp(by_step + by_rank)
        residuals = np.where(known, adjusted / predicted - 1, 0.0)
        spread = max(median(np.abs(residuals[known])) / 0.6745, 1e-4)
        if round_ == 0:  # a rank far off must not decide alone which of the others are the outliers
            spread *= 3
        weights = np.where(known, np.clip(1 - (residuals / (_TUKEY * spread)) ** 2, 0, None) ** 2, 0.0)
    return found


def _medians(values: Floats, axis: int) -> Floats:
    """Medians of what is known along the axis, 0 where nothing is."""
    none = ~np.isfinite(values).any(axis=axis)
    filled = np.where(np.expand_dims(none, axis), 0.0, values)
    medians: Floats = np.nanmedian(filled, axis=axis)
    return medians


def _variation(values: Floats) -> float:
    return float(values.std() / max(abs(values.mean()), 1e-300))
