"""Text written by the model."""

from __future__ import annotations

import torch
import torch.distributed as dist
from tokenizers import Tokenizer
from torch import Tensor

from lockstep_api.v1alpha1 import GenerateSpec
from lockstep_trainer.data.tokenizer import end_of_text
from lockstep_trainer.parallel.engine import Engine


def generate(engine: Engine, tokenizer: Tokenizer, spec: GenerateSpec, *, context: int, seed: int) -> str:
    """The continuation of the prompt, without the prompt. All ranks call it: a forward pass takes them all.

    The model sees at most ``context`` tokens. The draw is rank 0's, from a generator of its own, so that the text is a
    function of the weights and the seed.
    """
    end = end_of_text(tokenizer)
    # The prompt begins a text, as after an END_OF_TEXT in training.
    tokens = [end, *tokenizer.encode(spec.prompt, add_special_tokens=False).ids]
    written: list[int] = []
    generator = torch.Generator().manual_seed(seed)
    for _ in range(spec.tokens):
        window = torch.tensor([tokens[-context:]], device=engine.device)
        logits = engine.logits(window)[0, -1].float().cpu()
        choice = _choose(logits, spec.temperature, generator).to(engine.device)
        dist.broadcast(choice, src=0)
        token = int(choice.item())
        if token == end or token >= tokenizer.get_vocab_size():
            break
        tokens.append(token)
        written.append(token)
    return tokenizer.decode(written)


def _choose(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """One token id, shape (1,): the likeliest at temperature 0, else drawn."""
    if temperature == 0:
        return logits.argmax().reshape(1)
    return torch.multinomial(torch.softmax(logits / temperature, dim=-1), 1, generator=generator)
