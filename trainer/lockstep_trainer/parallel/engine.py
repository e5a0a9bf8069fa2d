"""One step's forward and backward, evaluation and logits, at any layout: what the training loop talks to.

The engine cuts a data-parallel rank's batch along the sequence for context parallelism and into micro-batches, runs
them through the parts of the model, with a schedule where there is a pipeline, and leaves gradients that are whole:
summed over micro-batches, data-parallel ranks and the two ends of a tied head.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F  # noqa: N812 (the field's name for it)

from lockstep_trainer.batch import IGNORE, Batch
from lockstep_trainer.errors import UserError
from lockstep_trainer.model.decoder import Decoder
from lockstep_trainer.parallel.context import local
from lockstep_trainer.parallel.layout import Layout
from lockstep_trainer.parallel.mesh import Meshes
from lockstep_trainer.parallel.pipeline import (
    Shapes,
    add_tied_gradients,
    build_schedule,
    second_copies,
    share_tied,
)

Section = Callable[[str], AbstractContextManager[None]]
Around = Callable[[int], AbstractContextManager[None]]


class LossFunction(Protocol):
    """What the engine asks of a loss; ``lockstep_trainer.loss`` has the usual one."""

    def __call__(self, logits: Tensor, targets: Tensor, denominator: Tensor | float) -> tuple[Tensor, Tensor]:
        """Logits (B, T, vocabulary or this tensor rank's part of it), targets (B, T) → the sum over tokens divided by
        ``denominator``, to be differentiated; and the undivided sums to report, (2,) float64 without gradient."""
        ...


class Engine:
    """Runs the parts of a model on this rank; every rank of the job calls the same methods in the same order.

    ``parts`` are one module for each stage on this rank, in the model's order. Without a pipeline that may be any
    module with ``forward(tokens)`` → logits, or ``forward(tokens, positions=…, documents=…)`` where documents are
    masked; then only data parallelism applies. ``documents``: it takes no tokens without positions and documents.
    ``dtype`` is what travels between pipeline stages. ``section`` times: «forward» and «backward», or «pipeline» where
    the two are mixed.

    Sums are float64, (2,): cross entropy and z-loss over the tokens of the call. Each token's are on one rank of the
    world, the others add zero, so that an all-reduce over the world gives the totals.
    """

    def __init__(
        self,
        parts: Sequence[nn.Module],
        layout: Layout,
        meshes: Meshes,
        loss: LossFunction,
        *,
        micro_batch_size: int,
        device: torch.device,
        documents: bool = False,
        dtype: torch.dtype = torch.float32,
        section: Section = nullcontext,  # type: ignore[assignment]
    ) -> None:
        share_tied(parts)
        self.parts, self.layout, self.meshes, self.loss = list(parts), layout, meshes, loss
        self.micro_batch_size, self.device, self.dtype, self.section = micro_batch_size, device, dtype, section
        self.second_copies = second_copies(parts)
        self._documents = documents
        self._counts = meshes.at.tensor == 0  # the ranks of a tensor group have the same tokens
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)
        self._denominator: Tensor | int = 1
        self._schedules: OrderedDict[tuple[object, ...], Any] = OrderedDict()
        self.around: Around = nullcontext  # type: ignore[assignment]
        """Entered around each piece of work on a micro-batch of a step, whose number it gets."""

    # --- what there is ------------------------------------------------------------------------------------------

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every parameter on this rank that the optimizer steps, once each.

        Those in ``second_copies`` are first on another rank: they are stepped here too, and stay equal since their
        gradients are; the gradient's norm counts them there.
        """
        seen = set()
        for part in self.parts:
            for name, parameter in part.named_parameters():
                if name not in seen:
                    seen.add(name)
                    yield name, parameter

    def state(self) -> dict[str, Tensor]:
        """Parameters and persistent buffers by name, as they are in memory. The names in ``second_copies`` have the
        same value on another rank: to be loaded here, but written only once."""
        return {
            name: value for part in self.parts for name, value in part.state_dict().items() if isinstance(value, Tensor)
        }

    # --- a step -------------------------------------------------------------------------------------------------

    def forward_backward(self, batch: Batch, denominator: Tensor | int) -> Tensor:
        """Forward and backward of a step's whole batch; returns its sums.

        ``denominator`` is the number of tokens with a target in the global batch. Gradients must be None or zero
        before; they are whole afterwards. Raises UserError where the schedule can't do so many micro-batches.
        """
        self._sums.zero_()
        self._denominator = denominator
        micro_batches = self._micro_batches(batch)
        if self.layout.pipeline > 1:
            self.layout.check_micro_batches(micro_batches)
            with self.section("pipeline"):
                self._run_schedule(self._cut(batch), micro_batches, training=True)
                add_tied_gradients(self.parts, self.meshes.tie)
            return self._sums.clone()
        (model,) = self.parts
        pieces = self._pieces(self._cut(batch), micro_batches)
        for number, piece in enumerate(pieces):
            if isinstance(model, FSDPModule):
                model.set_requires_gradient_sync(number == len(pieces) - 1)
            with self.around(number):
                with self.section("forward"):
                    loss = self._scaled_loss(_forward(model, piece), piece.targets)
                with self.section("backward"):
                    torch.autograd.backward(loss)
        return self._sums.clone()

    def first_micro_batch(self, batch: Batch) -> Batch:
        """This rank's share of the first micro-batch of a step's batch."""
        return self._pieces(self._cut(batch), self._micro_batches(batch))[0]

    def compute_again(self, piece: Batch, denominator: Tensor | int) -> None:
        """Forward and backward of one micro-batch, as ``first_micro_batch`` gives it, on its own: the same bits as
        within a step. Without a sum of the gradients of a tied embedding: somebody must drop gradients meanwhile."""
        self._denominator = denominator
        if self.layout.pipeline > 1:
            self._run_schedule(piece, 1, training=True, again=True)
            return
        (model,) = self.parts
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(True)
        with self.around(0):
            torch.autograd.backward(self._scaled_loss(_forward(model, piece), piece.targets))

    def evaluate(self, batch: Batch) -> Tensor:
        """Sums over the batch, without gradients. Every rank gives as many samples, since its forward passes are
        collective; samples whose targets are all ignored count nothing."""
        self._sums.zero_()
        self._denominator = 1
        with self._evaluating():
            if self.layout.pipeline > 1:
                micro_batches = -(-len(batch.inputs) // self.micro_batch_size)
                batch = _padded(batch, micro_batches * self.micro_batch_size)
                self._run_schedule(self._cut(batch), micro_batches, training=False)
            else:
                batch = self._cut(batch)
                for start in range(0, len(batch.inputs), self.micro_batch_size):
                    piece = _samples(batch, start, start + self.micro_batch_size)
                    self._scaled_loss(_forward(self.parts[0], piece), piece.targets)
        return self._sums.clone()

    def logits(self, tokens: Tensor, last: int = 1) -> Tensor:
        """Logits over the whole vocabulary at the last ``last`` positions, (B, last, vocabulary), on every rank.

        ``tokens``, (B, T) int64, are the same on every rank, of any length: they are padded at the end, where the
        causal order hides it, to what sequence and context parallelism need. Each sample is one document.
        """
        samples, length = tokens.shape
        last = min(last, length)
        padded = F.pad(tokens, (0, self._padded_length(length) - length))
        batch = Batch(padded, torch.full_like(padded, IGNORE))
        if self._documents:
            positions = torch.arange(padded.shape[1], device=padded.device).repeat(samples, 1)
            batch = replace(batch, positions=positions, documents=torch.zeros_like(padded))
        with self._evaluating():
            if self.layout.pipeline > 1:
                micro_batches = -(-samples // self.micro_batch_size)
                batch = _padded(batch, micro_batches * self.micro_batch_size)
                own = self._run_schedule(self._cut(batch), micro_batches, training=False, with_loss=False)
            else:
                own = _forward(self.parts[0], self._cut(batch))
        return self._gathered(own, samples, length, last)

    # --- how ----------------------------------------------------------------------------------------------------

    def _scaled_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        loss, sums = self.loss(logits, targets, self._denominator)
        if self._counts:
            self._sums += sums
        return loss

    def _micro_batches(self, batch: Batch) -> int:
        samples = len(batch.inputs)
        if samples % self.micro_batch_size:
            raise UserError(
                f"trainer.recipe.microBatchSize: {self.micro_batch_size} does not divide the {samples} samples that a "
                "data-parallel rank has in a step; change it or globalBatchTokens"
            )
        return samples // self.micro_batch_size

    def _cut(self, batch: Batch) -> Batch:
        """This rank's share of the sequence."""
        if self.layout.context == 1:
            return batch

        def share(field: Tensor) -> Tensor:
            return local(field, self.layout, self.meshes.rank)

        return Batch(
            share(batch.inputs),
            share(batch.targets),
            None if batch.positions is None else share(batch.positions),
            None if batch.documents is None else share(batch.documents),
        )

    def _pieces(self, batch: Batch, number: int) -> list[Batch]:
        size = len(batch.inputs) // number
        return [_samples(batch, start, start + size) for start in range(0, len(batch.inputs), size)]

    def _run_schedule(
        self, batch: Batch, micro_batches: int, *, training: bool, with_loss: bool = True, again: bool = False
    ) -> Any:
        """A pass of the pipeline over this rank's share of the sequence; the last stage's logits where there is no loss
        and this rank has it, else None. ``again``: a micro-batch on its own."""
        tokens = batch.inputs.shape[1]
        schedule = self._schedule(micro_batches, tokens, training=training, with_loss=with_loss, again=again)
        stages = self.layout.stages_of(self.meshes.at.pipeline)
        inputs = (batch.inputs,) if 0 in stages else ()
        target = batch.targets if with_loss and self.layout.stages - 1 in stages else None
        places = {"positions": batch.positions, "documents": batch.documents} if batch.documents is not None else {}
        run = schedule.step if training else schedule.eval
        return run(*inputs, target=target, return_outputs=not with_loss, **places)

    def _schedule(self, micro_batches: int, tokens: int, *, training: bool, with_loss: bool, again: bool) -> Any:
        """The schedule for so many micro-batches of this many tokens (on this context shard)."""
        key = (micro_batches, tokens, training, with_loss, again)
        if key in self._schedules:
            self._schedules.move_to_end(key)
            return self._schedules[key]
        config = self._decoder().config
        shapes = Shapes(
            samples=self.micro_batch_size,
            tokens=tokens,
            hidden_tokens=tokens // self.layout.tensor,
            dim=config.dim,
            vocabulary=config.vocab_size // self.layout.tensor,
            dtype=self.dtype,
        )
        schedule = build_schedule(
            self.parts,
            self.layout,
            self.meshes.pipeline,
            shapes=shapes,
            micro_batches=micro_batches,
            loss=self._scaled_loss if with_loss else None,
            device=self.device,
            order="alone" if again else "step" if training else "forward",
            around=self._around,
        )
        self._schedules[key] = schedule
        while len(self._schedules) > _KEPT_SCHEDULES:  # each holds buffers for what it receives
            self._schedules.popitem(last=False)
        return schedule

    def _around(self, micro_batch: int) -> AbstractContextManager[None]:
        return self.around(micro_batch)  # which may be set later

    def _decoder(self) -> Decoder:
        part = self.parts[0]
        assert isinstance(part, Decoder)  # only a decoder is split into stages
        return part

    def _padded_length(self, length: int) -> int:
        """What ``length`` tokens are padded to: the next power of two of what parallelism needs, so that a growing text
        has few shapes; no more than the model's positions where that fits."""
        unit = self.layout.tensor * self.layout.context * (2 if self.layout.context > 1 else 1)
        if unit == 1 and self.layout.pipeline == 1:
            return length
        units = -(-length // unit)
        padded = unit * (1 << (units - 1).bit_length())
        part = self.parts[0]
        if isinstance(part, Decoder) and length <= part.config.max_length < padded:
            return units * unit
        return padded

    def _gathered(self, own: Tensor | None, samples: int, length: int, last: int) -> Tensor:
        """The wanted positions' logits of all ranks in one tensor: each rank adds what only it has to zeros."""
        at, layout = self.meshes.at, self.layout
        if layout.world_size == 1:
            assert own is not None
            return own[:samples, length - last : length]
        part = self.parts[0]
        if isinstance(part, Decoder):
            vocabulary, dtype = part.config.vocab_size, self.dtype
        else:  # without a pipeline every rank has logits
            assert own is not None
            vocabulary, dtype = own.shape[-1], own.dtype
        wanted = torch.zeros(samples, last, vocabulary, dtype=dtype, device=self.device)
        if own is not None and at.replicate == at.shard == 0:
            natural = torch.arange(self._padded_length(length), device=self.device)
            places = local(natural, layout, self.meshes.rank, dim=0)
            here = (places >= length - last) & (places < length)
            width = own.shape[-1]
            columns = slice(at.tensor * width, (at.tensor + 1) * width)
            wanted[:, places[here] - (length - last), columns] = own[:samples, here].to(dtype)
        dist.all_reduce(wanted)
        return wanted

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        modes = [part.training for part in self.parts]
        for part in self.parts:
            part.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            for part, mode in zip(self.parts, modes, strict=True):
                part.train(mode)
                # Nothing else gives back what forward passes gathered: the next backward pass is too far.
                for module in part.modules():
                    if isinstance(module, FSDPModule):
                        module.reshard()


_KEPT_SCHEDULES = 4


def _forward(model: nn.Module, batch: Batch) -> Tensor:
    logits: Tensor
    if batch.documents is None:
        logits = model(batch.inputs)
    else:
        logits = model(batch.inputs, positions=batch.positions, documents=batch.documents)
    return logits


def _samples(batch: Batch, start: int, end: int) -> Batch:
    """The samples from ``start`` to before ``end``."""
    return Batch(
        batch.inputs[start:end],
        batch.targets[start:end],
        None if batch.positions is None else batch.positions[start:end],
        None if batch.documents is None else batch.documents[start:end],
    )


def _padded(batch: Batch, samples: int) -> Batch:
    """The batch with copies of its first sample at the end, whose targets are ignored, to so many samples."""
    index = torch.arange(samples, device=batch.inputs.device)
    missing = index >= len(batch.inputs)
    index[missing] = 0
    targets = batch.targets[index]
    targets[missing] = IGNORE
    return Batch(
        batch.inputs[index],
        targets,
        None if batch.positions is None else batch.positions[index],
        None if batch.documents is None else batch.documents[index],
    )
