"""Checkpoints in Hugging Face's format come back from every store as they were written."""

from __future__ import annotations

import json

import torch

from lockstep_trainer.model.config import DecoderConfig
from lockstep_trainer.model.decoder import Decoder
from lockstep_trainer.model.export import export_model
from lockstep_trainer.model.pretrained import load_weights, read_config
from lockstep_trainer.storage import ObjectStore

CONFIG = DecoderConfig(dim=32, layers=2, heads=4, kv_heads=2, ffn_dim=48, vocab_size=96, qk_norm=True)


def test_an_export_in_several_files_is_read_back(store: ObjectStore) -> None:
    written, read = Decoder(CONFIG).state_dict(), Decoder(CONFIG).state_dict()
    export_model(written, CONFIG, store, tokenizer=None, dtype=torch.float32, file_bytes=20_000)
    index = json.loads(store.get("model.safetensors.index.json")[0])
    files = {entry.key: entry.size for entry in store.list() if entry.key.endswith(".safetensors")}
    assert files.keys() == set(index["weight_map"].values())
    assert len(files) > 2
    assert index["metadata"]["total_size"] == sum(4 * tensor.numel() for tensor in written.values())
    load_weights(read, read_config(store), store)
    assert all(torch.equal(written[name], read[name]) for name in written)
