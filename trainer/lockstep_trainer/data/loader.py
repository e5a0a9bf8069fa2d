"""Batches of one data-parallel rank, step by step, read one step ahead."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from lockstep_api.v1alpha1 import DataSpec
from lockstep_trainer.batch import Batch
from lockstep_trainer.checkpoint.manifest import SamplerState, SourceState
from lockstep_trainer.data.batches import evaluation_batches, make_batch, read_windows
from lockstep_trainer.data.corpus import Corpus, Source
from lockstep_trainer.data.order import Draws, Mixture
from lockstep_trainer.data.packing import Samples, Windows
from lockstep_trainer.data.sampler import BatchSizes, Sampler, sampler_state, stages_of

T = TypeVar("T")


class Outlast(Protocol):
    """Makes a call again until it can be made."""

    def __call__(self, call: Callable[[], T], /) -> T:
        """What ``call`` returns in the end."""
        ...


def at_once(call: Callable[[], T], /) -> T:
    """Where nobody waits for a store."""
    return call()


class _Waiting:
    """Samples that the loader's thread reads, behind what it is at, and that are waited for."""

    def __init__(self, samples: Samples, thread: ThreadPoolExecutor, outlast: Outlast) -> None:
        self._samples, self._thread, self._outlast = samples, thread, outlast

    def __len__(self) -> int:
        return len(self._samples)

    def windows(self, ids: NDArray[np.int64]) -> Windows:
        """Tokens of these samples."""
        return self._outlast(lambda: self._thread.submit(self._samples.windows, ids).result())

    def close(self) -> None:
        """Let go of threads and files."""
        self._samples.close()


class Loader:
    """What each step of this rank is computed on.

    While a step runs, one thread reads the next: what is read is a function of the step alone, so it does not matter
    when. An error there is raised by the step that needs the data. Nobody else reads: a data set of the user's own may
    seek in one file. Use as a context manager, or call ``close``.
    """

    def __init__(
        self,
        corpus: Corpus,
        spec: DataSpec,
        batches: BatchSizes,
        *,
        seed: int,
        rank: int,
        ranks: int,
        outlast: Outlast = at_once,
    ) -> None:
        """``rank`` of ``ranks`` that read different samples. ``outlast`` makes a call until the store that it asks is
        there. Raises UserError where the mix can't be drawn."""
        self._corpus, self._spec, self._batches, self._outlast = corpus, spec, batches, outlast
        sizes = corpus.sizes()
        stages = () if spec.module else stages_of(spec, sizes, batches)
        self.mixture = Mixture(seed, tuple(sizes.values()), stages)
        self.sampler = Sampler(self.mixture, batches, rank, ranks)
        self._samples = [source.train for source in corpus.sources]
        self._ahead: tuple[int, Future[tuple[Batch, Draws]]] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loader")

    def batch(self, step: int) -> tuple[Batch, Draws]:
        """The batch of ``step`` (the first is 1), and which samples it has."""
        found = self._outlast(lambda: self._next(step))
        self._ahead = (step + 1, self._thread.submit(self._read, step + 1))
        return found

    def evaluation(self, source: Source, *, at_most: int, per_rank: int, alone: bool = False) -> Iterator[Batch]:
        """Batches of ``per_rank`` samples over at most ``at_most`` held-out samples of ``source``, spread over the
        ranks: together the same ones at any width, and as many batches on each rank. ``alone``: all of them here."""
        return evaluation_batches(
            _Waiting(source.holdout, self._thread, self._outlast),
            at_most=at_most,
            per_rank=per_rank,
            rank=0 if alone else self.sampler.rank,
            ranks=1 if alone else self.sampler.ranks,
            end=self._corpus.end,
            document_mask=self._spec.document_mask,
        )

    def state(self, *, last_change: int = 1) -> SamplerState:
        """The order of samples, as a checkpoint behind no step says it; ``SamplerState.behind`` gives later ones.

        From step ``last_change`` on, all steps have the same number of samples.
        """
        sources = [
            SourceState(name=source.name, samples=len(source.train), data=source.fingerprint)
            for source in self._corpus.sources
        ]
        return sampler_state(
            self.mixture,
            self._batches,
            steps=0,
            last_change=last_change,
            sources=sources,
            data=self._corpus.fingerprint,
        )

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(cancel_futures=True)
        self._corpus.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _next(self, step: int) -> tuple[Batch, Draws]:
        ahead, self._ahead = self._ahead, None
        return (ahead[1] if ahead and ahead[0] == step else self._thread.submit(self._read, step)).result()

    def _read(self, step: int) -> tuple[Batch, Draws]:
        draws = self.sampler.step(step)
        windows = read_windows(self._samples, draws)
        return make_batch(windows, end=self._corpus.end, document_mask=self._spec.document_mask), draws
