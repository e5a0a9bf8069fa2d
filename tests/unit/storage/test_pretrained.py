"""Checkpoints in Hugging Face's format come back from every store as they were written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lockstep_api.v1alpha1 import TokenizerTraining
from lockstep_trainer.data.tokenizer import train_tokenizer
from lockstep_trainer.errors import NotFound, StoreError, UserError
from lockstep_trainer.model.config import DecoderConfig
from lockstep_trainer.model.decoder import Decoder
from lockstep_trainer.model.export import export_model
from lockstep_trainer.model.pretrained import load_weights, read_config
from lockstep_trainer.storage import ObjectStore, open_store
from lockstep_trainer.storage.folder import FolderStore
from lockstep_trainer.storage.store import Entry, Head

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


def _keys(store: ObjectStore) -> set[str]:
    return {entry.key for entry in store.list()}


@pytest.mark.parametrize("sizes", [(20_000, 2**30), (2**30, 20_000), (20_000, 30_000)])
def test_an_export_replaces_an_earlier_one(store: ObjectStore, tmp_path: Path, sizes: tuple[int, int]) -> None:
    """Weights in one file or in several, and the tokenizer: nothing of the earlier one stays; what is not an export's
    does."""
    torch.manual_seed(0)
    models = [Decoder(CONFIG).state_dict(), Decoder(CONFIG).state_dict()]
    tokenizer = train_tokenizer(["one two three"], TokenizerTraining(vocab_size=260))
    store.put("model-card.md", b"whose it is")
    store.put("other/model.safetensors", b"another folder's")
    for model, size, brings in zip(models, sizes, (tokenizer, None), strict=True):
        export_model(model, CONFIG, store, tokenizer=brings, dtype=torch.float32, file_bytes=size)
    alone = open_store(f"file://{tmp_path}/alone")
    export_model(models[1], CONFIG, alone, tokenizer=None, dtype=torch.float32, file_bytes=sizes[1])
    assert _keys(store) == _keys(alone) | {"model-card.md", "other/model.safetensors"}
    assert all(store.get(key)[0] == alone.get(key)[0] for key in _keys(alone))
    read = Decoder(CONFIG).state_dict()
    load_weights(read, read_config(store), store)
    assert all(torch.equal(models[1][name], read[name]) for name in read)


def test_an_export_that_fails_leaves_no_model(tmp_path: Path) -> None:
    class Filling(FolderStore):
        def put(self, key: str, data: bytes, *, only_if_absent: bool = False, if_match: str | None = None) -> str:
            if key.startswith("model-00002"):
                raise StoreError(f"put {key}: no space left")
            return super().put(key, data, only_if_absent=only_if_absent, if_match=if_match)

    model = Decoder(CONFIG).state_dict()
    export_model(model, CONFIG, FolderStore(tmp_path), tokenizer=None)
    with pytest.raises(StoreError, match="no space left"):
        export_model(model, CONFIG, Filling(tmp_path), tokenizer=None, file_bytes=20_000)
    assert [path.name[:11] for path in tmp_path.glob("*.safetensors")] == ["model-00001"]
    with pytest.raises(UserError, match=r"config\.json is missing"):
        read_config(FolderStore(tmp_path))


class Guarded(FolderStore):
    """A bucket whose policy allows to get and to put alone: as on AWS, what is not there is denied like a list."""

    temporary = False

    def _denied(self, doing: str) -> StoreError:
        return StoreError(f"{doing}: Access Denied", temporary=self.temporary)

    def list(self, prefix: str = "", *, readable: bool = False) -> tuple[Entry, ...]:
        raise self._denied("list")

    def delete(self, key: str) -> None:
        raise self._denied("delete")

    def head(self, key: str) -> Head:
        try:
            return super().head(key)
        except NotFound:
            raise self._denied("head") from None

    def get(self, key: str) -> tuple[bytes, str]:
        try:
            return super().get(key)
        except NotFound:
            raise self._denied(f"get {key}") from None

    def get_range(self, key: str, offset: int, length: int) -> bytes:
        try:
            return super().get_range(key, offset, length)
        except NotFound:
            raise self._denied(f"get {key}") from None


def test_an_export_needs_to_put_alone_where_no_model_is(tmp_path: Path) -> None:
    model = Decoder(CONFIG).state_dict()
    export_model(model, CONFIG, Guarded(tmp_path), tokenizer=None, file_bytes=20_000)
    assert (tmp_path / "config.json").exists()
    with pytest.raises(StoreError, match="delete: Access Denied"):
        export_model(model, CONFIG, Guarded(tmp_path), tokenizer=None)
    assert not (tmp_path / "model.safetensors").exists(), "it would be read in place of what config.json stands for"


def test_an_export_that_may_not_list_replaces_an_earlier_one(tmp_path: Path) -> None:
    class Deleting(Guarded):
        def delete(self, key: str) -> None:
            FolderStore.delete(self, key)

    one, two = Decoder(CONFIG).state_dict(), Decoder(CONFIG).state_dict()
    export_model(one, CONFIG, Deleting(tmp_path), tokenizer=None, dtype=torch.float32)
    export_model(two, CONFIG, Deleting(tmp_path), tokenizer=None, dtype=torch.float32, file_bytes=20_000)
    read = Decoder(CONFIG).state_dict()
    load_weights(read, CONFIG, FolderStore(tmp_path))
    assert all(torch.equal(two[name], read[name]) for name in read)


def test_an_outage_while_an_earlier_export_is_removed_is_told(tmp_path: Path) -> None:
    class Away(Guarded):
        temporary = True

    class AwayLater(Away):
        def delete(self, key: str) -> None:
            FolderStore.delete(self, key)

    for store in (Away(tmp_path), AwayLater(tmp_path)):
        with pytest.raises(StoreError, match="Access Denied"):
            export_model(Decoder(CONFIG).state_dict(), CONFIG, store, tokenizer=None)
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("file_bytes", [20_000, 2**30])
def test_weights_are_read_by_those_who_may_not_list(tmp_path: Path, file_bytes: int) -> None:
    written, read = Decoder(CONFIG).state_dict(), Decoder(CONFIG).state_dict()
    store = FolderStore(tmp_path)
    export_model(written, CONFIG, store, tokenizer=None, dtype=torch.float32, file_bytes=file_bytes)
    load_weights(read, CONFIG, Guarded(tmp_path))
    assert all(torch.equal(written[name], read[name]) for name in read)
    for name in ("model.safetensors", "model.safetensors.index.json"):
        store.delete(name)
    with pytest.raises(StoreError, match=r"get model\.safetensors: Access Denied"):
        load_weights(read, CONFIG, Guarded(tmp_path))


def test_an_outage_while_weights_are_looked_for_is_no_other_layout(tmp_path: Path) -> None:
    class Away(Guarded):
        temporary = True

    model = Decoder(CONFIG).state_dict()
    export_model(model, CONFIG, FolderStore(tmp_path), tokenizer=None, file_bytes=20_000)
    with pytest.raises(StoreError, match=r"get model\.safetensors: Access Denied") as caught:
        load_weights(model, CONFIG, Away(tmp_path))
    assert caught.value.temporary


def test_one_file_counts_more_than_the_index_of_several(tmp_path: Path) -> None:
    """As in `transformers`: a folder with both is read alike."""
    torch.manual_seed(0)
    several, one = Decoder(CONFIG).state_dict(), Decoder(CONFIG).state_dict()
    export_model(one, CONFIG, FolderStore(tmp_path / "one"), tokenizer=None, dtype=torch.float32)
    store = FolderStore(tmp_path / "both")
    export_model(several, CONFIG, store, tokenizer=None, dtype=torch.float32, file_bytes=20_000)
    store.put("model.safetensors", (tmp_path / "one/model.safetensors").read_bytes())
    read = Decoder(CONFIG).state_dict()
    load_weights(read, CONFIG, store)
    assert all(torch.equal(one[name], read[name]) for name in read)
