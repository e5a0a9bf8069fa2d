"""The training loop of one worker."""

from __future__ import annotations

import logging
import math
import time

import torch
import torch.distributed as dist
from torch import Tensor

from lockstep_trainer.bigram import bigram_loss
from lockstep_trainer.checkpoint.keeper import Keeper
from lockstep_trainer.checkpoint.manifest import SourceState
from lockstep_trainer.checkpoint.state import training_state
from lockstep_trainer.config import Job, Orders
from lockstep_trainer.data.order import Mixture
from lockstep_trainer.data.prepare import Corpus, sample_batch, samples_in
from lockstep_trainer.data.sampler import ConstantBatch, Sampler, sampler_state
from lockstep_trainer.errors import TrainerError, UserError
from lockstep_trainer.evaluate import evaluate, evaluation_samples, reference_loss, token_loss
from lockstep_trainer.generate import generate
from lockstep_trainer.model.presets import model_config
from lockstep_trainer.optim.build import build_optimizer, set_learning_rate
from lockstep_trainer.optim.norms import local_squares, scale_gradients
from lockstep_trainer.optim.schedule import learning_rate
from lockstep_trainer.outbox import Outbox
from lockstep_trainer.parallel.parallelize import accumulate, build_model, initialize, make_mesh
from lockstep_trainer.ranks import Ranks
from lockstep_trainer.sections import Sections
from lockstep_trainer.steprecord import StepWriter

log = logging.getLogger(__name__)

MICRO_BATCH_TOKENS = 8192
"""Tokens that one forward pass of a rank takes at most: bounds the memory for logits, and fills a GPU."""


class Trainer:
    """Model, optimizer and data of one rank, and the loop over them."""

    def __init__(
        self,
        *,
        job: Job,
        orders: Orders,
        ranks: Ranks,
        corpus: Corpus,
        outbox: Outbox,
        records: StepWriter,
        sections: Sections,
    ) -> None:
        self.job, self.orders, self.ranks, self.corpus = job, orders, ranks, corpus
        self.outbox, self.records, self.sections = outbox, records, sections
        spec, recipe = job.trainer, job.trainer.recipe
        self.length = spec.data.sequence_length
        samples = samples_in(corpus.meta.train, self.length)
        if not samples:
            raise UserError(
                f"trainer.data: {corpus.meta.train} tokens of text are less than one sample of {self.length}; "
                "add text, or lower trainer.data.sequenceLength"
            )
        batches = ConstantBatch(job.samples_per_step)
        mixture = Mixture(recipe.seed, (samples,))
        self.sampler = Sampler(mixture, batches, ranks.rank, ranks.size)
        self.tokenizer = corpus.tokenizer()
        mesh = make_mesh(ranks.device, ranks.size, job.spec.parallelism.replicate)
        config = model_config(spec.model, self.tokenizer.get_vocab_size())
        self.model = build_model(config, mesh, ranks.device, recipe.precision)
        self.optimizer = build_optimizer(self.model.named_parameters(), recipe.optimizer)
        self.keeper = Keeper(
            job,
            orders,
            ranks,
            outbox,
            sampler_state(
                mixture,
                batches,
                steps=0,
                last_change=1,
                sources=[SourceState(name=spec.data.sources[0].name, samples=samples, data=corpus.meta.fingerprint)],
                data=corpus.meta.fingerprint,
            ),
        )
        self.step = 0  # optimizer steps done

    def restore(self) -> None:
        """Load the state that the orders name; fresh weights without one."""
        step = self.keeper.restore(training_state(self.model, self.optimizer))
        if step is None:
            initialize(self.model, self.job.trainer.recipe.seed)
        else:
            self.step = step
        log.info("starting behind step %d", self.step)

    # --- the loop -----------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Steps until the last one, with checkpoints and evaluations between them."""
        recipe, evaluation = self.job.trainer.recipe, self.job.trainer.evaluate
        while self.step < recipe.steps:
            self._train_step(self.step + 1)
            if self.keeper.due(self.step):
                with self.sections("checkpoint"):
                    self.keeper.save(self.step, training_state(self.model, self.optimizer))
            if evaluation and self.step % evaluation.every == 0 and self.step < recipe.steps:
                with self.sections("evaluate"):
                    self._evaluate()

    def finish(self) -> None:
        """After the last step: the final evaluation, with the bigram model beside it, and a sample of text."""
        spec = self.job.trainer
        if spec.evaluate:
            with self.sections("evaluate"):
                self._evaluate(with_bigram=True)
        if spec.generate:
            with self.sections("generate"):
                text = generate(
                    self.model,
                    self.tokenizer,
                    spec.generate,
                    context=self.length,
                    seed=spec.recipe.seed,
                    device=self.ranks.device,
                )
                self._say("text", step=self.step, prompt=spec.generate.prompt, text=text)

    def _train_step(self, step: int) -> None:
        recipe, section = self.job.trainer.recipe, self.sections
        before = section.take()  # what happened between two steps: restore, checkpoint, evaluate
        begun = time.perf_counter()
        with section("load"):
            batch = self._batch(step)
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.ranks.device)
        micro = max(1, MICRO_BATCH_TOKENS // self.length)
        pieces = torch.split(batch, micro)
        for number, piece in enumerate(pieces):
            accumulate(self.model, last=number == len(pieces) - 1)
            with section("forward"):
                loss = token_loss(self.model(piece[:, :-1]), piece[:, 1:])
            with section("backward"):
                # The gradient of the mean over all tokens of all ranks: gradients are averaged over the ranks.
                torch.autograd.backward(loss * (self.ranks.size / recipe.global_batch_tokens))
            loss_sum += loss.detach()
        with section("collective"):
            loss_mean, norm = self._totals(loss_sum)
        with section("optimizer"):
            lr = learning_rate(step, steps=recipe.steps, peak=recipe.optimizer.lr, schedule=recipe.schedule)
            scale_gradients(self.model.parameters(), norm, recipe.clip_grad_norm)
            set_learning_rate(self.optimizer, lr)
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.step = step
        self.records.record(
            step=step,
            at=time.time(),
            seconds=time.perf_counter() - begun,
            loss=loss_mean,
            tokens=recipe.global_batch_tokens,
            grad_norm=norm,
            lr=lr,
            sections={**before, **section.take()},
        )

    def _batch(self, step: int) -> Tensor:
        """This rank's tokens of the step, (samples, length + 1); their ids are logged before they are used."""
        draws = self.sampler.step(step)
        self.keeper.consumed(step, draws)
        return torch.from_numpy(sample_batch(self.corpus.train, draws.sample, self.length)).to(self.ranks.device)

    def _totals(self, loss_sum: Tensor) -> tuple[float, float]:
        """Mean loss over all tokens, and the norm of the whole gradient, in one all-reduce."""
        totals = torch.stack([loss_sum, local_squares(self.model.parameters())])
        dist.all_reduce(totals)
        loss, squares = totals.tolist()
        # Every copy of the sharded model has contributed the whole gradient.
        norm = math.sqrt(squares / self.job.spec.parallelism.replicate)
        loss /= self.job.trainer.recipe.global_batch_tokens
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise TrainerError(
                f"step {self.step + 1} has loss {loss} and gradient norm {norm}: going back to the last checkpoint; "
                "if it comes again, lower trainer.recipe.optimizer.lr"
            )
        return loss, norm

    def _evaluate(self, *, with_bigram: bool = False) -> None:
        spec = self.job.trainer.evaluate
        assert spec is not None
        samples = evaluation_samples(self.corpus, self.length, spec.batches * self.job.samples_per_step)
        if not len(samples):
            raise UserError(
                f"trainer.data.holdout: {self.corpus.meta.holdout} held-out tokens are less than one sample of "
                f"{self.length}; raise it, or add text"
            )
        per_rank = max(1, MICRO_BATCH_TOKENS // self.length)
        result = evaluate(
            self.model, self.corpus, samples, sequence_length=self.length, per_rank=per_rank, device=self.ranks.device
        )
        fields: dict[str, float] = {"loss": result.loss, "tokens": result.tokens}
        if with_bigram and self.ranks.leads:
            fields["bigram_loss"] = reference_loss(
                self.corpus,
                samples,
                sequence_length=self.length,
                vocabulary=self.tokenizer.get_vocab_size(),
                model=bigram_loss,
            )
        self._say("evaluate", step=self.step, **fields)

    def _say(self, kind: str, **fields: object) -> None:
        if self.ranks.leads:
            self.outbox.event(kind, **fields)
