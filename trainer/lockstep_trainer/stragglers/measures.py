"""From the work of each step to histories of what is compared: one per part of the work, 0 where all is as expected."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lockstep_trainer.stragglers import settings
from lockstep_trainer.stragglers.expected import Model, fit
from lockstep_trainer.stragglers.history import Floats, History, median
from lockstep_trainer.stragglers.layout import Layout
from lockstep_trainer.stragglers.settings import LONGEST, Settings
from lockstep_trainer.stragglers.work import Work

_RAW = ("compute", "tokens", "squares", "host", "data", "clock")


class Measures:
    """The last ``LONGEST`` steps of a layout.

    ``compute`` and ``lengths`` are logarithms of ratios: computed to expected, and expected to the peers' expected.
    ``host`` and ``data`` are shares of the peers' own work in a step, above what is usual among peers. ``store``, of
    one unit, is for how much of a step's work, waiting left out, nearly all ranks of a stage waited for their batches.
    ``stages`` is the logarithm of a stage's compute over the mean of the stages that computed the same samples.
    """

    def __init__(self, layout: Layout, user: Settings) -> None:
        ranks, log = len(layout.places), user.logarithm
        self.layout = layout
        self.steps = 0
        """Steps ever added."""
        self.numbers: list[int] = []
        """Numbers of the steps known, oldest first."""
        self.models: list[Model | None] = [None] * len(layout.stages)
        self.compute = History(ranks, 3 * log)
        self.lengths = History(ranks, max(1.0, 3 * log))
        self.host = History(ranks, 1.0)
        self.data = History(ranks, 1.0)
        self.store = History(1, 1.0)
        self.stages = History(len(layout.stages), 3 * log)
        self._raw = {name: np.full((LONGEST, ranks), np.nan, dtype=np.float32) for name in _RAW}
        self._seconds = np.full(LONGEST, np.nan)
        self._compared = [group for group in layout.peers if len(group) > 1]
        self._usual_host: float | None = None  # of a rank alone in its job

    def add(self, number: int, work: Sequence[Work], seconds: float) -> None:
        """One step. Work of ranks that have no place is left out; a rank may be missing."""
        row = self.steps % LONGEST
        known = [(self.layout.index[one.rank], one) for one in work if one.rank in self.layout.index]
        at = np.array([index for index, _ in known], dtype=np.intp)
        for name in _RAW:
            values = self._raw[name][row]
            values[:] = np.nan
            if name != "clock":
                values[at] = [getattr(one, name) for _, one in known]
            else:
                values[at] = [np.nan if one.clock is None else one.clock for _, one in known]
        self._seconds[row] = seconds
        self.steps += 1
        self.numbers = [*self.numbers[-LONGEST + 1 :], number]
        last = {name: self._raw[name][row].astype(float) for name in _RAW}
        self._add_waits(last)
        self.stages.append(self._between_stages(last["compute"]))
        if any(self.models):
            rows = self._against_expected(*(last[name][None, :] for name in ("compute", "tokens", "squares")))
            self.compute.append(rows[0][0])
            self.lengths.append(rows[1][0])

    @property
    def calibration_due(self) -> bool:
        """The expected time is to be fitted now."""
        return self.steps in settings.CALIBRATE or (
            self.steps > settings.CALIBRATE[-1] and self.steps % settings.RECALIBRATE == 0
        )

    def calibrate(self, frozen: frozenset[int]) -> None:
        """Fits the expected time anew from the steps known, ``frozen`` stages left out, and looks at these steps again
        with it."""
        compute, tokens, squares = (self.raw(name) for name in ("compute", "tokens", "squares"))
        if 0 not in frozen or self._usual_host is None:
            self._usual_host = median(self.raw("host").ravel())
        for stage, members in enumerate(self.layout.stages):
            if stage not in frozen or self.models[stage] is None:
                self.models[stage] = fit(compute[:, members], tokens[:, members], squares[:, members])
        ratio, lengths = self._against_expected(compute, tokens, squares)
        self.compute.rebuild(ratio)
        self.lengths.rebuild(lengths)

    def raw(self, name: str, last: int = LONGEST) -> Floats:
        """What was told [steps, ranks], oldest first, NaN where it is not known."""
        last = min(last, self.steps, LONGEST)
        rows = [step % LONGEST for step in range(self.steps - last, self.steps)]
        return self._raw[name][rows].astype(float)

    def seconds(self, last: int) -> float:
        """Median time of the job's last steps."""
        last = min(last, self.steps, LONGEST)
        return float(np.median(self._seconds[[step % LONGEST for step in range(self.steps - last, self.steps)]]))

    def number(self, ago: int) -> int:
        """Number of the step so many steps ago, 1 for the last; of the first one known, if that is more."""
        return self.numbers[-min(ago, len(self.numbers))]

    def lost(self, seconds: float, last: int) -> float:
        """Share of the job's step time, over the last steps, that so many seconds a step are."""
        return min(max(seconds / max(self.seconds(last), 1e-9), 0.0), 1.0)

    def own(self, last: int, parts: Sequence[str] = ("compute", "host", "data")) -> float:
        """Median seconds of own work in a step, over ranks and the last steps."""
        return median(sum((self.raw(name, last) for name in parts), np.zeros(1)).ravel())

    def level(self, name: str, rank: int, last: int) -> float:
        """Median of what was told of a rank over the last steps; 0 where it is not known."""
        return median(self.raw(name, last)[:, rank])

    def forget(self, rank: int) -> None:
        """The rank is on another node: nothing is held against it."""
        for history in (self.compute, self.lengths, self.host, self.data):
            history.forget(rank)
        for raw in self._raw.values():
            raw[:, rank] = np.nan

    def _add_waits(self, last: dict[str, Floats]) -> None:
        host, data = np.full_like(last["host"], np.nan), np.full_like(last["data"], np.nan)
        own = last["compute"] + last["host"] + last["data"]
        for group in self.layout.peers:
            scale = max(median(own[group]), 1e-9)
            if len(self.layout.places) == 1:  # its own past, as there is nobody else
                usual = median(self.raw("host").ravel()) if self._usual_host is None else self._usual_host
                host[group] = (last["host"] - usual) / scale
                data[group] = last["data"] / scale
                continue
            for shares, values in ((host, last["host"]), (data, last["data"])):
                base = values if len(group) == 1 else values[group]
                least = float(np.nanmin(base)) if np.isfinite(base).any() else 0.0
                shares[group] = (values[group] - (median(base) if len(group) != 2 else least)) / scale
        self.host.append(host)
        self.data.append(data)
        work = own - last["data"]
        together = [_least(last["data"][group]) / max(median(work[group]), 1e-9) for group in self._compared]
        self.store.append(np.array([max(together, default=0.0)]))

    def _between_stages(self, compute: Floats) -> Floats:
        columns = self.layout.columns
        if len(self.layout.stages) == 1 or columns.shape[1] == 0:
            return np.zeros(len(self.layout.stages))
        logs = np.log(np.maximum(compute[columns], 1e-9))
        centred = np.sort(logs - logs.mean(axis=0), axis=1)  # NaN last: a column with a missing rank
        whole = int(np.isfinite(centred[0]).sum())
        if not whole:
            return np.full(len(self.layout.stages), np.nan)
        return centred[:, (whole - 1) // 4]  # the stage is as slow as its healthy ranks, not as a slow one of them

    def _against_expected(self, compute: Floats, tokens: Floats, squares: Floats) -> tuple[Floats, Floats]:
        """Rows [steps, ranks] of the histories ``compute`` and ``lengths``."""
        ratio, lengths = np.full_like(compute, np.nan), np.full_like(compute, np.nan)
        for members, model in zip(self.layout.stages, self.models, strict=True):
            if model is None:
                continue
            expected = np.log(np.maximum(model.seconds(tokens[:, members], squares[:, members]), 1e-9))
            ratio[:, members] = np.log(np.maximum(compute[:, members], 1e-9)) - expected
            lengths[:, members] = expected - _centres(expected)
        if len(self.layout.places) > 1:
            everyone = _centres(ratio)
            for group in self.layout.peers:
                ratio[:, group] -= _centres(ratio[:, group]) if len(group) > 1 else everyone
        return ratio, lengths


def _least(values: Floats) -> float:
    """The lower quartile of what is known; 0 where nothing is."""
    known = np.sort(values[np.isfinite(values)])
    return float(known[(len(known) - 1) // 4]) if len(known) else 0.0


def _centres(values: Floats) -> Floats:
    """Median [steps, 1] over ranks of what is known in each step [steps, ranks], 0 where nothing is."""
    if len(values) == 1:
        return np.array([[median(values[0])]])
    unknown = np.isnan(values).all(axis=1, keepdims=True)
    centres: Floats = np.nanmedian(np.where(unknown, 0.0, values), axis=1, keepdims=True)
    return centres
