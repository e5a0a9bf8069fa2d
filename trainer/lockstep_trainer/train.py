"""The training loop of one worker."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from lockstep_trainer.assembly import assemble, batch_sizes, fill
from lockstep_trainer.batch import Batch
from lockstep_trainer.bigram import MAX_TOKENS, bigram_loss
from lockstep_trainer.callbacks import Callbacks, Checkpoint, Evaluation, Outcome, Run, Step
from lockstep_trainer.checkpoint.keeper import Keeper, Vote
from lockstep_trainer.checkpoint.recall import costs_of
from lockstep_trainer.checkpoint.snapshots import FOLDER, rank_folder
from lockstep_trainer.checkpoint.state import training_state
from lockstep_trainer.config import Job, Orders
from lockstep_trainer.data.corpus import Corpus, Source
from lockstep_trainer.data.loader import Loader
from lockstep_trainer.errors import TrainerError
from lockstep_trainer.evaluate import evaluate, own_tokens, reference_loss
from lockstep_trainer.generate import generate
from lockstep_trainer.injection import faultwatch
from lockstep_trainer.injection.bitflips import Injector
from lockstep_trainer.injection.faultwatch import FaultWatch, first_moment
from lockstep_trainer.lookout import Lookout
from lockstep_trainer.measuring.workmeter import WorkMeter
from lockstep_trainer.model.export import export_model
from lockstep_trainer.optim.build import build_optimizer, set_learning_rate, start_fresh
from lockstep_trainer.optim.schedule import learning_rate
from lockstep_trainer.outage import outlast
from lockstep_trainer.outbox import Outbox
from lockstep_trainer.parallel.compiling import watch_compilation
from lockstep_trainer.parallel.expert import update_balance
from lockstep_trainer.parallel.gradients import clip, squares
from lockstep_trainer.profiling import Profiler
from lockstep_trainer.randomness import seed_step
from lockstep_trainer.ranks import Ranks, patience
from lockstep_trainer.replay.report import Replay
from lockstep_trainer.runtime import Garbage, refusing
from lockstep_trainer.sections import Sections
from lockstep_trainer.steprecord import StepWriter
from lockstep_trainer.storage import open_store
from lockstep_trainer.tenure import Tenure
from lockstep_trainer.throughput import Meter

log = logging.getLogger(__name__)


class Trainer:
    """Model, optimizer and data of one rank, and the loop over them."""

    def __init__(
        self,
        *,
        job: Job,
        orders: Orders,
        ranks: Ranks,
        corpus: Corpus,
        folder: Path,
        records: StepWriter,
        sections: Sections,
        tenure: Tenure,
    ) -> None:
        self.job, self.orders, self.ranks, self.corpus = job, orders, ranks, corpus
        self.outbox, self.records, self.sections = Outbox(folder), records, sections
        spec, recipe = job.trainer, job.trainer.recipe
        self.length = spec.data.sequence_length
        self.callbacks = Callbacks.open(spec.callbacks, leads=ranks.leads)
        self.tokenizer = corpus.tokenizer()
        self.batches = batch_sizes(job, ranks.size)
        timeout = patience(job.spec.resilience.hang)
        snapshots = folder.parent.parent / FOLDER
        known = costs_of(rank_folder(snapshots, ranks.rank), orders.memory.state) if orders.memory else None
        with tenure.connections.opening():
            model = assemble(
                job,
                ranks,
                self.batches,
                tokens=corpus.vocabulary,
                timeout=timeout,
                section=sections,
                measured=known,
            )
        self.engine, self.layout, self.meshes = model.engine, model.layout, model.meshes
        self.config, self.weights = model.config, model.weights
        faults = faultwatch.prepare(orders, self.engine.parts, ranks.control, compiled=recipe.compile)
        injector = Injector.from_environment(self.engine.parts, ranks.rank, compiled=recipe.compile)
        injector = injector or (faults if isinstance(faults, Injector) else None)
        self.replay = Replay.of(job, self.engine, ranks.control, injector, self._say, doubt=orders.doubt)
        self.parameters = list(self.engine.named_parameters())
        self.optimizer = build_optimizer(self.parameters, recipe.optimizer)
        self.lookout = Lookout.of(
            job,
            self.parameters,
            self.optimizer,
            self.layout,
            self.engine.second_copies,
            say=self._say,
            suspect=self.replay.suspect,
        )
        self.work = WorkMeter.of(job, self.engine, self.optimizer)
        self.faults: FaultWatch | None = None
        if orders.faults is not None:
            self.faults = FaultWatch(
                Path(orders.faults),
                orders,
                injector=injector or faults,
                work=self.work,
                moments=partial(first_moment, self.parameters, self.optimizer.state),
                stand_still=tenure.stand_still,
            )
        self.loader = Loader(
            corpus,
            spec.data,
            self.batches,
            seed=recipe.seed,
            rank=self.layout.data_rank(ranks.rank),
            ranks=self.layout.data_width,
            outlast=partial(outlast, sections=sections),
        )
        last_change = self.batches.steps + 1
        sampler = self.loader.state(last_change=last_change)
        self.keeper = Keeper(
            job,
            orders,
            ranks,
            self.outbox,
            sampler=sampler,
            config=self.config,
            costs=model.measured.numbers() if model.measured else None,
            snapshots=snapshots,
            check=tenure.check,
        )
        self.profiler = Profiler(folder, ranks.rank, ranks.device, sections)
        self.garbage = Garbage()
        self._watching = watch_compilation(sections) if recipe.compile else None
        self.meter = Meter.of(
            self.config,
            weights=self.weights,
            sequence_length=self.length,
            ranks=ranks.size,
            precision=recipe.precision,
            device=ranks.device,
        )
        self.step = 0  # optimizer steps done

    def restore(self) -> None:
        """Load the state that the orders name; without one fresh weights, or those of ``model.initFrom``."""
        stepped = {f"model.{name}" for name, _ in self.parameters}
        step = self.keeper.restore(
            self._state(), changes=lambda name: name.startswith("model.") and name not in stepped
        )
        if step is None:
            start_fresh(self.optimizer)
            fill(self.engine, self.job, self.ranks.control)
        else:
            self.step = step
        log.info("starting behind step %d", self.step)
        self.callbacks.start(Run.of(self.job, self.orders, step=self.step, parameters=self.weights))

    # --- the loop -----------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Steps until the last one, with checkpoints and evaluations between them."""
        recipe, evaluation = self.job.trainer.recipe, self.job.trainer.evaluate
        self.garbage.take_over()
        self.work.begin()
        while self.step < recipe.steps:
            if self.faults:
                self.faults.step(self.step)
            if self._train_step(self.step + 1):
                # Behind the last step it may have to wait until a buffer is free; elsewhere it only begins.
                with self.sections("checkpoint" if self.step == recipe.steps else "stage"):
                    begun = time.perf_counter()
                    self.keeper.take(self.step, self._state)
                    self.callbacks.checkpoint(Checkpoint(self.step, time.perf_counter() - begun))
                if self.keeper.holds:
                    with self.sections("checkpoint"):
                        self.keeper.hold()
            if evaluation and self.step % evaluation.every == 0 and self.step < recipe.steps:
                with self.sections("evaluate"):
                    self._evaluate()
            if self.garbage.due(self.step):
                with self.sections("garbage"):
                    self.garbage.collect()
            if self.work.device_due(self.step):
                with self.sections("yardstick"):
                    self.work.measure_device()
            if self.work.link_due(self.step):
                with self.sections("collective"):
                    self.work.measure_link(self.step)
            self.profiler.step(self.step)

    def finish(self) -> None:
        """After the last step: the final evaluation, with the bigram model beside it, a sample of text, the export."""
        spec = self.job.trainer
        if spec.evaluate:
            with self.sections("evaluate"):
                self._evaluate(with_bigram=True)
        if spec.generate:
            with self.sections("generate"):
                text = generate(self.engine, self.tokenizer, spec.generate, context=self.length, seed=spec.recipe.seed)
                self._say("text", step=self.step, prompt=spec.generate.prompt, text=text)
        if spec.export:
            with self.sections("export"):
                self._export(spec.export.uri)

    def close(self, outcome: Outcome) -> None:
        """End what runs beside the loop; callbacks hear how it ended."""
        self.profiler.close()
        if self._watching is not None:
            self._watching()
        self.loader.close()
        self.keeper.close()
        self.work.close()
        self.callbacks.close(outcome)
        self.garbage.give_back()

    def _train_step(self, step: int) -> bool:
        """True where a snapshot is taken behind it."""
        recipe, section = self.job.trainer.recipe, self.sections
        begun = time.perf_counter()
        with section("load"):
            batch, draws = self.loader.batch(step)
            self.keeper.consumed(step, draws)  # logged before it is used
            self.work.batch(batch)
            batch = batch.to(self.ranks.device)
        with section("collective"):
            tokens = own_tokens(self.engine, batch)
            dist.all_reduce(tokens)
        seed_step(recipe.seed, step, self.loader.sampler.rank, self.ranks.device)
        measured = self.work.windows(measured=not self.replay.includes(step))
        with refusing(recipe.deterministic and self.ranks.device.type == "cuda"), measured:
            sums = self.replay.forward_backward(step, batch, tokens)
        with section("collective"):
            loss, norm, vote = self._totals(sums, tokens, self.keeper.vote(step))
            taking = self.keeper.agreed(step, vote)
        with section("stage"):
            self.keeper.wait()
        with section("optimizer"):
            lr = learning_rate(step, steps=recipe.steps, peak=recipe.optimizer.lr, schedule=recipe.schedule)
            clip(self.parameters, norm, recipe.clip_grad_norm)
            set_learning_rate(self.optimizer, lr)
            with self.replay.update(step, self.parameters, self.optimizer), self.work.optimizer():
                self.optimizer.step()
            self.optimizer.zero_grad()
            update_balance(self.engine.parts, self.meshes)
        if self.replay.agreed(step):
            self.keeper.replayed(step)
        with section("collective"):
            self.lookout.updated(step)
        self.step = step
        at, seconds = time.time(), time.perf_counter() - begun
        trained = self.batches.samples(step) * self.length
        sections = section.take()  # with what happened between two steps: restore, checkpoint, evaluate
        speed = self.meter.step(trained, seconds)
        self.records.record(
            step=step,
            at=at,
            seconds=seconds,
            loss=loss,
            tokens=trained,
            grad_norm=norm,
            lr=lr,
            sections=sections,
            trained=self.batches.samples_before(step + 1) * self.length,
            mfu=speed.mfu,
            memory=speed.memory,
            own=self.work.take(),
        )
        if self.callbacks:
            extra = {"memory_bytes": float(speed.memory)} | ({} if speed.mfu is None else {"mfu": speed.mfu})
            self.callbacks.step(Step(step, at, seconds, loss, trained, norm, lr, sections, extra))
        return taking

    def _totals(self, sums: Tensor, tokens: Tensor, vote: Vote) -> tuple[float, float, Vote]:
        """Mean loss over all tokens, the norm of the whole gradient and the sum of the votes, in one all-reduce."""
        norm2 = squares(self.parameters, self.layout, self.engine.second_copies)
        totals = torch.cat([torch.stack([sums[0], norm2]), sums.new_tensor(vote.numbers())])
        dist.all_reduce(totals)
        loss_sum, square, *votes, count = torch.cat([totals, tokens.double().reshape(1)]).tolist()
        loss, norm = loss_sum / count, math.sqrt(square)
        self.lookout.look(self.step + 1, loss, norm)
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise TrainerError(
                f"step {self.step + 1} has loss {loss} and gradient norm {norm}: going back to the last checkpoint; "
                "if it comes again, lower trainer.recipe.optimizer.lr"
            )
        return loss, norm, Vote(*votes)

    # --- between steps ------------------------------------------------------------------------------------------

    def _state(self) -> dict[str, object]:
        return training_state(self.engine.state(), self.parameters, self.optimizer)

    def _evaluate(self, *, with_bigram: bool = False) -> None:
        held_out = {source.name: self._held_out(source) for source in self.corpus.evaluated}
        found = evaluate(self.engine, held_out)
        fields: dict[str, object] = {"loss": found.whole.loss, "tokens": found.whole.tokens}
        losses = {name: score.loss for name, score in found.sources.items()}
        if len(losses) > 1:
            fields["sources"] = losses
        if with_bigram and self.ranks.leads:
            training = self.corpus.training_tokens(MAX_TOKENS)
            if len(training) > 1:  # an own data set has no stream to count
                batches = chain.from_iterable(self._held_out(source, alone=True)() for source in self.corpus.evaluated)
                fields["bigram_loss"] = reference_loss(bigram_loss, training, batches, self.corpus.vocabulary)
        self._say("evaluate", step=self.step, **fields)
        self.callbacks.evaluation(Evaluation(self.step, found.whole.loss, found.whole.tokens, losses))

    def _held_out(self, source: Source, *, alone: bool = False) -> Callable[[], Iterator[Batch]]:
        """The batches of an evaluation of ``source`` on this data-parallel rank; ``alone``: all ranks' together."""
        spec = self.job.trainer.evaluate
        assert spec is not None
        return partial(
            self.loader.evaluation,
            source,
            at_most=spec.batches * self.job.samples_per_step,
            per_rank=self.engine.micro_batch_size,
            alone=alone,
        )

    def _export(self, uri: str) -> None:
        assert self.config is not None  # a model of the user's own is refused with it
        export_model(
            {**self.engine.state()},
            self.config,
            open_store(uri, self.job.checkpoint.s3),
            tokenizer=self.tokenizer,
            group=self.ranks.control,
        )
        self._say("export", step=self.step, uri=uri)

    def _say(self, kind: str, **fields: object) -> None:
        if self.ranks.leads:
            self.outbox.event(kind, **fields)
