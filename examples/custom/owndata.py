"""Sums to learn, made as they are asked for: «17+25=42;»."""

import random


class Sums:
    """Sample i is the same whenever it is asked for, and in whichever process."""

    def __init__(self, tokenizer, sequence_length: int, samples: int) -> None:
        self.tokenizer, self.length, self.samples = tokenizer, sequence_length, samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, i: int) -> list[int]:
        """``sequence_length`` + 1 token ids."""
        draw = random.Random(i)
        ids: list[int] = []
        while len(ids) <= self.length:
            a, b = draw.randrange(50), draw.randrange(50)
            ids += self.tokenizer.encode(f"{a}+{b}={a + b};").ids
        return ids[: self.length + 1]

    def fingerprint(self) -> str:
        """Changes when the data does: a job that goes on with other data is refused."""
        return f"sums below 50, {self.samples} samples, version 1"


def build(spec, tokenizer, sequence_length: int) -> Sums:
    """What `data.module: owndata:build` names."""
    return Sums(tokenizer, sequence_length, samples=20_000)
