"""The size of the batch over the steps: smaller at the start, as gradients then are alike (McCandlish et al.: An
Empirical Model of Large-Batch Training, 2018), in equal parts up to the whole."""

from __future__ import annotations

from dataclasses import dataclass

from lockstep_api.v1alpha1 import RecipeSpec
from lockstep_trainer.errors import UserError


@dataclass(frozen=True, slots=True)
class BatchRamp:
    """How many samples each step has, over all ranks: a pure function of the step.

    Level k of ``increments`` + 1 has ``first`` + k × ``increase`` samples; the levels below the last take ``steps``
    steps together, evenly. Without a ramp there is one level.
    """

    first: int
    increase: int
    increments: int
    steps: int

    @classmethod
    def of(cls, recipe: RecipeSpec, *, sequence_length: int, data_width: int) -> BatchRamp:
        """The ramp of ``recipe``; raises UserError where a level is no multiple of the data-parallel width, in samples
        of ``sequence_length`` tokens."""
        unit = sequence_length * data_width
        ramp = recipe.batch_ramp
        whole = recipe.global_batch_tokens
        if whole % unit:
            raise UserError(
                f"trainer.recipe.globalBatchTokens: {whole} is not a multiple of sequenceLength × data-parallel width "
                f"= {unit}; choose a multiple"
            )
        if ramp is None:
            return cls(whole // sequence_length, 0, 0, 0)
        if ramp.start_tokens % unit or (whole - ramp.start_tokens) % (ramp.increments * unit):
            raise UserError(
                "trainer.recipe.batchRamp: startTokens and each of the parts up to globalBatchTokens must be multiples "
                f"of sequenceLength × data-parallel width = {unit}; change startTokens or increments"
            )
        increase = (whole - ramp.start_tokens) // ramp.increments // sequence_length
        return cls(ramp.start_tokens // sequence_length, increase, ramp.increments, ramp.steps)

    def samples(self, step: int) -> int:
        """Samples of step ``step`` (the first is 1)."""
        return self.first + self.level(step) * self.increase

    def samples_before(self, step: int) -> int:
        """Samples of all steps before ``step``."""
        done = (step - 1) * self.first
        for level in range(1, self.level(step) + 1):
            done += (step - self._begins(level)) * self.increase  # each level adds its part to all steps from its first
        return done

    def level(self, step: int) -> int:
        """How many parts have been added in step ``step``."""
        if not self.increments:
            return 0
        return min(self.increments, (step - 1) * self.increments // self.steps)

    def _begins(self, level: int) -> int:
        return -(-level * self.steps // self.increments) + 1
