"""The smallest job that has every part: two pods of one worker each, a model of two tiny layers."""

from __future__ import annotations

STEPS = 1000


def overrides(steps: int = STEPS, every: int = 10) -> list[str]:
    """What to change in the quick-start manifest."""
    return [
        "gpusPerNode=1",
        "trainer.model.overrides={layers: 2, dim: 32}",
        "trainer.tokenizer.train.vocabSize=300",
        "trainer.data.sources.0.maxBytes=400000",
        "trainer.data.sequenceLength=32",
        "trainer.recipe.globalBatchTokens=256",
        f"trainer.recipe.steps={steps}",
        "trainer.evaluate=null",
        "trainer.generate=null",
        f"checkpoint.every={every}",
        "checkpoint.keep.last=10000",  # the checker follows the chain to its beginning
    ]
