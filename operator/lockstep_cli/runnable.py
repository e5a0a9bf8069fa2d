"""Why a job could not run although the API server takes it: what is the trainer's to know, as far as it is known
without tokenizer, data and devices. It goes by the manifest alone, so it holds on this machine as in a cluster; what a
path leads to is only known where the job runs. Nothing here needs torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from lockstep_api.v1alpha1 import TrainerSpec, TrainingJob, TrainingJobSpec
from lockstep_api.v1alpha1.widths import obstacle
from lockstep_cli.errors import ManifestError
from lockstep_trainer.data import sources
from lockstep_trainer.errors import UserError
from lockstep_trainer.model import presets
from lockstep_trainer.model.config import DecoderConfig
from lockstep_trainer.model.huggingface import family
from lockstep_trainer.parallel.layout import Layout
from lockstep_trainer.storage.store import check_path

_ANYWHERE = "file://{stdlib}"
"""How a source begins that every machine has."""


def checked(job: TrainingJob, source: str) -> TrainingJob:
    """The job that was read from ``source``, which can run; raises ManifestError with all that is in its way."""
    if found := problems(job):
        raise ManifestError(source, found)
    return job


def problems(job: TrainingJob) -> list[str]:
    """A sentence for each, the field first."""
    spec = job.spec
    found = list(_uri_problems(spec))
    if spec.trainer:
        found += _trainer_problems(spec, spec.trainer)
    return [f"spec.{sentence}" for sentence in found]


def _uri_problems(spec: TrainingJobSpec) -> Iterator[str]:
    for field, uri in _uris(spec):
        if uri.startswith("file://") and not uri.startswith(("file:///", _ANYWHERE)):
            yield f"{field}: {uri!r} is no path from the root on; write file:///folder with three slashes"
        elif uri.startswith("s3:///"):
            yield f"{field}: {uri!r} names no bucket; write s3://bucket/prefix"
        else:
            yield from (f"{field}: {why}" for why in _refusal(check_path, _store_of(field, uri)))
    if spec.checkpoint and spec.checkpoint.resume_from:
        from lockstep_trainer.checkpoint.chain import parts_of  # takes a while: only for those who resume

        yield from _refusal(parts_of, spec.checkpoint.resume_from)


def _uris(spec: TrainingJobSpec) -> Iterator[tuple[str, str]]:
    """All that the job reads and writes, with the fields that name it."""
    named: list[tuple[str, str | None]] = []
    if checkpoint := spec.checkpoint:
        named += [("checkpoint.uri", checkpoint.uri), ("checkpoint.resumeFrom", checkpoint.resume_from)]
    if trainer := spec.trainer:
        evaluated = trainer.evaluate.sources if trainer.evaluate else []
        named += [
            ("trainer.model.initFrom", trainer.model.init_from),
            ("trainer.tokenizer.uri", trainer.tokenizer.uri),
            *((f"trainer.data.sources.{index}.uri", each.uri) for index, each in enumerate(trainer.data.sources)),
            *((f"trainer.evaluate.sources.{index}.uri", each.uri) for index, each in enumerate(evaluated)),
            ("trainer.export.uri", trainer.export.uri if trainer.export else None),
        ]
    return ((field, uri) for field, uri in named if uri is not None)


def _store_of(field: str, uri: str) -> str:
    """The part of it that the trainer opens as a store: behind that is a pattern, or a file's name as it is."""
    if ".sources." in field:
        return sources.split(uri)[0]
    folder, _, name = uri.rstrip("/").rpartition("/")
    return folder if field == "trainer.tokenizer.uri" and name.endswith(".json") else uri


def _trainer_problems(spec: TrainingJobSpec, trainer: TrainerSpec) -> Iterator[str]:
    if why := obstacle(spec, spec.nodes):
        yield f"trainer.recipe: {why}; change globalBatchTokens or microBatchSize"
    if trainer.model.preset is None:  # a model of the user's own: what it takes is its own affair
        return
    wrong = [*_refusal(presets.find, trainer.model.preset)]
    for name, value in trainer.model.overrides.items():
        wrong += _refusal(presets.checked, name, value)
    yield from wrong or _refusal(_fits, spec, trainer)


def _fits(spec: TrainingJobSpec, trainer: TrainerSpec) -> None:
    """Raises UserError where the sizes do not go together, or not with the degrees of parallelism or an export."""
    layout = Layout.of(spec.parallelism, spec.nodes * spec.gpus_per_node)
    length = trainer.data.sequence_length
    config = _config(trainer, layout)
    layout.check(config, sequence_length=length, micro_batches=layout.fitting(1))
    if trainer.export and trainer.model.init_from is None:
        family(config)


def _config(trainer: TrainerSpec, layout: Layout) -> DecoderConfig:
    """The model, with a vocabulary that any layout can share: the job's is its tokenizer's."""
    assert trainer.model.preset is not None
    changes = {name: presets.checked(name, value) for name, value in trainer.model.overrides.items()}
    config = presets.with_changes(presets.find(trainer.model.preset).config, changes, vocab_size=64 * layout.tensor)
    if trainer.model.init_from is None:
        presets.check(config)
        return config
    # The rest is said by the weights' own config.json, here the length of a table of positions.
    length = config.max_length if "max_length" in changes else max(config.max_length, trainer.data.sequence_length)
    return presets.with_changes(config, {}, max_length=length)


def _refusal(check: Callable[..., object], *given: object) -> list[str]:
    """What ``check`` says against what it is given; nothing where it takes it."""
    try:
        check(*given)
    except UserError as error:
        return [str(error)]
    return []
