"""Checkpoints in Hugging Face's format come in and go out at any layout, bit by bit the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from forked import run_ranks
from lockstep_api.v1alpha1 import TrainerSpec
from lockstep_trainer.assembly import check_export_folder
from lockstep_trainer.errors import StoreError, UserError
from lockstep_trainer.model.config import DecoderConfig
from lockstep_trainer.model.decoder import Decoder
from lockstep_trainer.model.export import export_model
from lockstep_trainer.model.pretrained import load_weights, read_config
from lockstep_trainer.parallel.layout import Layout
from lockstep_trainer.parallel.mesh import Meshes
from lockstep_trainer.parallel.parallelize import build_parts
from lockstep_trainer.parallel.pipeline import parts_of
from lockstep_trainer.parallel.stages import costs_by_count
from lockstep_trainer.storage import open_store
from lockstep_trainer.storage.folder import FolderStore

DENSE = DecoderConfig(dim=24, layers=3, heads=4, kv_heads=2, ffn_dim=36, vocab_size=66, tie_embeddings=True)
MIXTURE = replace(
    DENSE, experts=4, expert_dim=10, routing="sigmoid", shared_expert_dim=20, dense_layers=1, tie_embeddings=False
)
LAYOUTS = {
    "fsdp": (DENSE, Layout(shard=3)),  # shards are uneven
    "hsdp": (DENSE, Layout(replicate=2, shard=2)),
    "fsdp and tensor": (replace(DENSE, qk_norm=True), Layout(shard=2, tensor=2)),
    "fsdp and pipeline": (DENSE, Layout(shard=2, pipeline=2)),
    "experts": (MIXTURE, Layout(shard=2, tensor=2, expert=2)),
    "experts in a pipeline": (MIXTURE, Layout(shard=2, pipeline=2, expert=2)),
}
CPU = torch.device("cpu")


def original(folder: Path, config: DecoderConfig) -> None:
    """A checkpoint with random weights, from one process."""
    torch.manual_seed(0)
    model = Decoder(config)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.normal_()
    export_model(
        model.state_dict(), config, open_store(f"file://{folder}"), tokenizer=None, dtype=torch.float32, file_bytes=9000
    )


def own_state(config: DecoderConfig, layout: Layout) -> dict[str, Tensor]:
    """This rank's part of a model without values."""
    meshes = Meshes.build(layout, CPU)
    stages = parts_of(layout, meshes.at.pipeline, costs_by_count(config))
    parts = build_parts(config, layout, meshes, device=CPU, stages=stages)
    state: dict[str, Tensor] = {}
    for part in parts:
        state |= dict(part.named_parameters())
        state |= {name: tensor for name, tensor in part.named_buffers() if name.endswith("router_bias")}
    for tensor in state.values():
        tensor.detach().fill_(float("nan"))
    return state


def tensors(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            assert name not in found, f"{name} was written twice"
            found[name] = tensor
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_was_read_is_written_at_any_layout(tmp_path: Path, name: str) -> None:
    config, layout = LAYOUTS[name]
    before, after = tmp_path / "before", tmp_path / "after"
    run_ranks(1, lambda _rank: original(before, config))

    def through(_rank: int) -> None:
        state = own_state(config, layout)
        source = open_store(f"file://{before}")
        load_weights(state, read_config(source), source, group=dist.group.WORLD)
        target = open_store(f"file://{after}")
        export_model(state, config, target, tokenizer=None, dtype=torch.float32, file_bytes=9000)

    run_ranks(layout.world_size, through)
    want, got = tensors(before), tensors(after)
    assert want.keys() == got.keys()
    assert all(torch.equal(want[key], got[key]) for key in want)
    assert (before / "config.json").read_bytes() == (after / "config.json").read_bytes()


def test_files_are_dealt_out_to_the_ranks(tmp_path: Path) -> None:
    def export(rank: int) -> None:
        state = own_state(DENSE, Layout(shard=2))
        written: list[str] = []

        class Noting(FolderStore):
            def put(self, key: str, data: bytes, *, only_if_absent: bool = False, if_match: str | None = None) -> str:
                written.append(key)
                return super().put(key, data, only_if_absent=only_if_absent, if_match=if_match)

        export_model(state, DENSE, Noting(tmp_path), tokenizer=None, file_bytes=4000)
        shards = sorted(key for key in written if key.endswith(".safetensors"))
        lists: list[list[str]] = [[], []]
        dist.all_gather_object(lists, shards)
        assert abs(len(lists[0]) - len(lists[1])) <= 1
        assert len(set(lists[0]) & set(lists[1])) == 0
        assert ("config.json" in written) == (rank == 0)

    run_ranks(2, export)


def test_all_ranks_learn_that_one_could_not_write(tmp_path: Path) -> None:
    class Full(FolderStore):
        def put(self, key: str, data: bytes, *, only_if_absent: bool = False, if_match: str | None = None) -> str:
            raise StoreError(f"put {key}: no space left")

    def export(rank: int) -> None:
        state = own_state(DENSE, Layout(shard=2))
        store = Full(tmp_path) if rank == 1 else FolderStore(tmp_path)
        with pytest.raises(StoreError, match="no space left"):
            export_model(state, DENSE, store, tokenizer=None, file_bytes=4000)

    run_ranks(2, export)


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("trainer.model.initFrom", {"model": {"preset": "llama-debug", "initFrom": "s3://models/mine"}}),
        ("trainer.tokenizer.uri", {"tokenizer": {"uri": "s3://models/mine/tokenizer.json"}}),
    ],
)
def test_a_job_may_not_replace_what_it_reads(field: str, changes: dict[str, Any]) -> None:
    """Its export removes first what it replaces, and where that is cut off the job begins again."""
    least = {"model": {"preset": "llama-debug"}, "data": {"sources": [{"uri": "s3://text/*"}]}, "recipe": {"steps": 1}}
    export = {"export": {"uri": "s3://models/mine/"}}
    check_export_folder(TrainerSpec.model_validate(least | export))
    with pytest.raises(UserError, match=rf"^trainer\.export\.uri: the export would replace {field}; name another"):
        check_export_folder(TrainerSpec.model_validate(least | export | changes))


@pytest.mark.parametrize(
    ("uri", "sentence"),
    [
        ("s3://models/mine?v=2", "'s3://models/mine?v=2': what follows ? or # is no part of a URI's path; write %3F "),
        ("file:///models/#2", "'file:///models/#2': what follows ? or # is no part of a URI's path; write %3F and"),
        ("file://models", "'file://models' names no store: write s3://bucket/prefix, or file:///folder with three"),
    ],
)
def test_an_export_that_has_nowhere_to_go_is_refused_before_training(uri: str, sentence: str) -> None:
    least = {"model": {"preset": "llama-debug"}, "data": {"sources": [{"uri": "s3://text/*"}]}, "recipe": {"steps": 1}}
    with pytest.raises(UserError) as caught:
        check_export_folder(TrainerSpec.model_validate(least | {"export": {"uri": uri}}))
    assert str(caught.value).startswith(f"trainer.export.uri: {sentence}")


def test_bfloat16_rounds_each_weight_once(tmp_path: Path) -> None:
    def export(_rank: int) -> None:
        state = own_state(DENSE, Layout(shard=2))
        source = open_store(f"file://{tmp_path / 'before'}")
        load_weights(state, DENSE, source)
        export_model(state, DENSE, open_store(f"file://{tmp_path / 'after'}"), tokenizer=None)

    run_ranks(1, lambda _rank: original(tmp_path / "before", DENSE))
    run_ranks(2, export)
    want, got = tensors(tmp_path / "before"), tensors(tmp_path / "after")
    assert all(torch.equal(want[name].bfloat16(), got[name]) for name in want)
