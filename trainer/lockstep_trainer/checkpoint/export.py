"""The model out of a step folder, in Hugging Face's format, by one process and without the job.

Memory: one tensor at a time, besides what ``model.export`` holds (two files of 1 GiB or one tensor, whichever is more).
"""

from __future__ import annotations

from collections.abc import Callable, ItemsView, Iterator, Mapping
from dataclasses import fields

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from lockstep_api.v1alpha1 import S3Spec, TrainerSpec
from lockstep_trainer.checkpoint.archive import tensor_in
from lockstep_trainer.checkpoint.manifest import METADATA, FileEntry, Manifest, Ranges, ranges_of
from lockstep_trainer.checkpoint.metadata import load_metadata
from lockstep_trainer.data.tokenizer import load_tokenizer
from lockstep_trainer.errors import Corrupt, NotFound, UserError
from lockstep_trainer.model.config import DecoderConfig
from lockstep_trainer.model.export import export_model
from lockstep_trainer.model.huggingface import counterparts, family
from lockstep_trainer.model.presets import model_config
from lockstep_trainer.model.pretrained import read_config
from lockstep_trainer.storage import ObjectStore, open_store
from lockstep_trainer.storage.checksum import crc64nvme

_MODEL = "model."
"""What the names of the model's tensors begin with in a checkpoint."""
_EMBEDDING = "embedding.weight"


class Weights(Mapping[str, Tensor]):
    """The model's tensors of a step folder by the decoder's names, each read and verified when it is asked for.

    Whoever looks at ``items`` wants to know what there is: they are without data. Raises Corrupt before a wrong byte is
    handed over.
    """

    def __init__(self, store: ObjectStore, manifest: Manifest, read: Callable[[int], None] = lambda _: None) -> None:
        self._store, self._manifest, self._read = store, manifest, read
        where = f"{store.uri}/{manifest.folder}/{METADATA}"
        self._metadata: Metadata = load_metadata(self._file(manifest.file(METADATA)), where)
        self._ranges: dict[str, Ranges] = {}

    def __getitem__(self, name: str) -> Tensor:
        described = self._described(name)
        whole = torch.empty(described.size, dtype=described.properties.dtype)
        for chunk in described.chunks:
            place = whole
            for dim, (offset, length) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
                place = place.narrow(dim, offset, length)
            place.copy_(self._chunk(MetadataIndex(_MODEL + name, chunk.offsets)))
        return whole

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(_MODEL) for name in self._metadata.state_dict_metadata if name.startswith(_MODEL))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def items(self) -> ItemsView[str, Tensor]:
        """Names and shapes, without data."""
        return {name: torch.empty(self.shape(name), device="meta") for name in self}.items()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor; raises KeyError."""
        return tuple(self._described(name).size)

    def size(self) -> int:
        """Bytes of all of them."""
        return sum(
            self._described(name).size.numel() * self._described(name).properties.dtype.itemsize for name in self
        )

    def _described(self, name: str) -> TensorStorageMetadata:
        found = self._metadata.state_dict_metadata[_MODEL + name]
        if not isinstance(found, TensorStorageMetadata):
            raise KeyError(name)
        return found

    def _chunk(self, index: MetadataIndex) -> Tensor:
        info = (self._metadata.storage_data or {})[index]
        name, offset, length = info.relative_path, info.offset, info.length
        where = f"{self._store.uri}/{self._manifest.folder}/{name}"
        expected = {(at, size): checksum for at, size, checksum in self._pieces(name)}.get((offset, length))
        if expected is None:
            raise Corrupt(f"{where}: bytes {offset}+{length} are not in {ranges_of(name)}")
        try:
            data = self._store.get_range(f"{self._manifest.folder}/{name}", offset, length)
        except NotFound:
            raise Corrupt(f"{where} is missing") from None
        if len(data) != length or crc64nvme(data) != expected:
            raise Corrupt(f"{where}: bytes {offset}+{length} differ from their checksum")
        self._read(length)
        return tensor_in(memoryview(bytearray(data)), where)  # torch wants memory that can be written

    def _pieces(self, name: str) -> tuple[tuple[int, int, str], ...]:
        key = ranges_of(name)
        if key not in self._ranges:
            self._ranges[key] = Ranges.from_bytes(self._file(self._manifest.file(key)), key)
        return self._ranges[key].files.get(name, ())

    def _file(self, file: FileEntry) -> bytes:
        where = f"{self._store.uri}/{self._manifest.folder}/{file.name}"
        try:
            data, _ = self._store.get(f"{self._manifest.folder}/{file.name}")
        except NotFound:
            raise Corrupt(f"{where} is missing") from None
        if len(data) != file.size or crc64nvme(data) != file.crc64nvme:
            raise Corrupt(f"{where} differs from its checksum")
        return data


def stated(manifest: Manifest) -> DecoderConfig | None:
    """The decoder that the manifest speaks of, if it does; raises UserError where a newer release has written it."""
    if manifest.model is None:
        return None
    unknown = manifest.model.keys() - {field.name for field in fields(DecoderConfig)}
    if unknown:
        raise UserError(
            f"{manifest.folder}: this release knows no {', '.join(sorted(unknown))} of a model; export it with the one "
            f"that wrote it, Lockstep {manifest.versions.get('lockstep', '?')}"
        )
    try:
        return TypeAdapter(DecoderConfig).validate_python(manifest.model)
    except ValidationError as error:
        first = error.errors()[0]
        raise Corrupt(f"{manifest.folder}: its manifest's model.{first['loc'][0]}: {first['msg']}") from None


def architecture(manifest: Manifest, spec: TrainerSpec | None, s3: S3Spec, weights: Weights) -> DecoderConfig:
    """The decoder whose weights these are: by the manifest, or, where that does not say, by ``spec``.

    Raises UserError where neither says it, or where the checkpoint has another one's weights.
    """
    shapes = {name: weights.shape(name) for name in weights}
    config = stated(manifest) or _ordered(spec, s3, shapes)
    for counterpart in counterparts(config, family(config)):
        found = shapes.get(counterpart.name)
        if found != counterpart.shape and not (counterpart.exact and found is None):
            has = f"has the shape {list(found)}" if found else "is missing"
            raise UserError(
                f"{counterpart.name} {has} in the checkpoint, and should have {list(counterpart.shape)}: trainer.model "
                "is not what it was trained with; give the job's own manifest"
            )
    return config


def _ordered(spec: TrainerSpec | None, s3: S3Spec, shapes: Mapping[str, tuple[int, ...]]) -> DecoderConfig:
    """The decoder that the job's spec asks for, with as many tokens as the checkpoint has."""
    if spec is None:
        raise UserError("the checkpoint does not say what the model is: give the manifest of its job")
    if spec.model.preset is None:
        raise UserError("trainer.model.module: a model of your own has no form that `transformers` knows")
    if _EMBEDDING not in shapes:
        raise UserError(f"the checkpoint has no {_MODEL}{_EMBEDDING}: its model is none of Lockstep's")
    checkpoint = read_config(open_store(spec.model.init_from, s3)) if spec.model.init_from else None
    return model_config(spec.model, shapes[_EMBEDDING][0], checkpoint=checkpoint)


def export(
    store: ObjectStore,
    manifest: Manifest,
    spec: TrainerSpec | None,
    s3: S3Spec,
    to: ObjectStore,
    *,
    tokenizer: str | None,
    tokenizer_field: str,
    dtype: torch.dtype,
    began: Callable[[int], None],
    read: Callable[[int], None],
) -> DecoderConfig:
    """Write the model of a step folder into ``to``; ``spec`` is needed where its manifest has no model.

    ``tokenizer`` is the URI of a tokenizer.json, or of the folder that has one, and ``tokenizer_field`` what it was
    given in, for messages. ``began`` is told the bytes to come, ``read`` bytes as they are read. Raises UserError,
    Corrupt, StoreError.
    """
    weights = Weights(store, manifest, read)
    config = architecture(manifest, spec, s3, weights)
    loaded = load_tokenizer(tokenizer, s3, tokenizer_field) if tokenizer else None
    began(weights.size())
    export_model(weights, config, to, tokenizer=loaded, dtype=dtype)
    return config
