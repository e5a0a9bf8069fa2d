"""Faults made on purpose strike where they say and nowhere else, and what can't be struck is refused."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

from lockstep_trainer.errors import UserError
from lockstep_trainer.injection.bitflips import VARIABLE, Fault, Injector
from lockstep_trainer.model.config import DecoderConfig
from lockstep_trainer.model.decoder import Block, Decoder

CONFIG = DecoderConfig(dim=16, layers=2, heads=2, kv_heads=1, ffn_dim=24, vocab_size=32, norm_eps=1e-5)
TOKENS = torch.arange(12).view(2, 6)


def decoder() -> Decoder:
    torch.manual_seed(0)
    return Decoder(CONFIG)


def block(model: Decoder, layer: int) -> Block:
    found = model.blocks[str(layer)]
    assert isinstance(found, Block)
    return found


def seen(model: Decoder, module: nn.Module) -> Tensor:
    """What ``module`` gives in a forward pass of ``model``."""
    outputs: list[Tensor] = []
    handle = module.register_forward_hook(lambda _module, _inputs, output: outputs.append(output.detach().clone()))
    model(TOKENS)
    handle.remove()
    return outputs[0]


def test_a_product_has_one_flipped_bit() -> None:
    model, clean = decoder(), decoder()
    Injector([model], 3, [Fault(3, "product", layer=1, bit=31, element=20), Fault(2, "product", layer=0)])
    wrong = seen(model, block(model, 1).attention.query)
    right = seen(clean, block(clean, 1).attention.query)
    assert wrong.view(-1)[20] == -right.view(-1)[20], "the sign"
    wrong.view(-1)[20] = right.view(-1)[20]
    assert torch.equal(wrong, right)
    assert torch.equal(seen(model, block(model, 0)), seen(clean, block(clean, 0))), "another rank's fault"


def test_a_weight_is_wrong_while_it_is_used_only() -> None:
    model, clean = decoder(), decoder()
    Injector([model], 0, [Fault(0, "weight", layer=1, bit=22)])
    assert not torch.equal(model(TOKENS), clean(TOKENS))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), clean.parameters(), strict=True))


def test_an_input_gradient_is_wrong_and_the_forward_pass_is_not() -> None:
    model, clean = decoder(), decoder()
    Injector([model], 0, [Fault(0, "inputGradient", layer=1, bit=22)])
    assert torch.equal(model(TOKENS), clean(TOKENS))
    model(TOKENS).sum().backward()
    clean(TOKENS).sum().backward()
    differ = {
        name
        for (name, mine), (_, theirs) in zip(model.named_parameters(), clean.named_parameters(), strict=True)
        if not torch.equal(torch.as_tensor(mine.grad), torch.as_tensor(theirs.grad))
    }
    assert "blocks.1.ffn_norm.weight" in differ
    assert not any(name.startswith(("blocks.1.ffn.", "head", "norm")) for name in differ)


def test_faults_come_and_go_as_they_are_armed() -> None:
    model, clean = decoder(), decoder()
    injector = Injector([model], 0)
    assert torch.equal(model(TOKENS), clean(TOKENS))
    fault = Fault(0, "activation", layer=0, bit=22, rate=0.5, seed=1)
    injector.arm([fault])
    stream = fault.stream()
    for _ in range(20):
        assert torch.equal(model(TOKENS), clean(TOKENS)) == (stream.random() >= fault.rate)
    injector.arm([Fault(0, "activation", bit=22, when="replay")])
    assert torch.equal(model(TOKENS), clean(TOKENS))
    injector.replaying = lambda: True
    assert not torch.equal(model(TOKENS), clean(TOKENS))


def test_a_fault_of_a_pod_or_node_strikes_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCKSTEP_POD_NAME", "run-1-0")
    monkeypatch.setenv("LOCKSTEP_NODE_NAME", "gpu-9")
    for on, strikes in (("", True), ("run-1-0", True), ("gpu-9", True), ("run-1-1", False)):
        model, clean = decoder(), decoder()
        Injector([model], 0, [Fault(0, "activation", bit=22, on=on)])
        assert torch.equal(model(TOKENS), clean(TOKENS)) != strikes


def test_a_fault_begins_after_its_chances() -> None:
    model, clean = decoder(), decoder()
    Injector([model], 0, [Fault(0, "activation", bit=22, after=3)])
    assert [torch.equal(model(TOKENS), clean(TOKENS)) for _ in range(5)] == [True, True, True, False, False]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[{]", "LOCKSTEP_FAULTS: Invalid JSON"),
        ('[{"rank": 0, "site": "soul"}]', "LOCKSTEP_FAULTS: Input should be 'product'"),
        ('[{"site": "product"}]', "LOCKSTEP_FAULTS: Field required"),
    ],
)
def test_what_can_not_be_read_is_refused(text: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, text)
    with pytest.raises(UserError, match=words.replace("[", r"\[")):
        Injector.from_environment([decoder()], 0, compiled=False)


def test_what_can_not_be_struck_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert Injector.from_environment([nn.Linear(2, 2)], 0, compiled=True) is None
    monkeypatch.setenv(VARIABLE, json.dumps([{"rank": 0, "site": "product"}]))
    with pytest.raises(UserError, match=r"compiled blocks; set trainer\.recipe\.compile to false"):
        Injector.from_environment([decoder()], 0, compiled=True)
    with pytest.raises(UserError, match="the built-in decoder only"):
        Injector.from_environment([nn.Linear(2, 2)], 0, compiled=False)
