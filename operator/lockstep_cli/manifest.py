"""Reads a TrainingJob from a file, applies ``--set`` and says in sentences what is wrong with it."""

from __future__ import annotations

import copy
import difflib
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from lockstep_api import constants
from lockstep_api.crd import alternatives
from lockstep_api.v1alpha1 import TrainingJob
from lockstep_cli.errors import ManifestError

Document = dict[str, Any]

_TOP_LEVEL = ("apiVersion", "kind", "metadata", "spec", "status")
_NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
_LONGEST_NAME = 52
"""Pods are called <job>-<ordinal>-<incarnation>, and a pod's name must fit a DNS label of 63 characters."""


def load(source: str, overrides: Sequence[str] = ()) -> TrainingJob:
    """The TrainingJob in the YAML file ``source`` (``-`` is standard input), with each ``path=value`` applied.

    Raises ManifestError.
    """
    return parse(override(read(source), overrides), source)


def read(source: str) -> Document:
    """The one TrainingJob document in a file that may hold other objects too."""
    try:
        text = sys.stdin.read() if source == "-" else Path(source).read_text()
        documents = [document for document in yaml.load_all(text, _StrictLoader) if document is not None]
    except FileNotFoundError:
        raise ManifestError(source, ["no such file; give the path of a TrainingJob manifest"]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError(source, [f"can't be read: {error}"]) from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: 2026-13-01 has the form of a date
        raise ManifestError(source, [f"is not YAML: {_yaml_problem(error)}"]) from None
    jobs = [document for document in documents if isinstance(document, dict) and document.get("kind") == constants.KIND]
    if len(jobs) == 1:
        return jobs[0]
    if jobs:
        raise ManifestError(source, [f"holds {len(jobs)} {constants.KIND}s; put each in a file of its own"])
    kinds = [str(document.get("kind")) if isinstance(document, dict) else "no object" for document in documents]
    found = ", ".join(kinds) or "nothing"
    raise ManifestError(source, [f"kind: no {constants.KIND} in it (found: {found}); set kind: {constants.KIND}"])


def override(document: Document, overrides: Iterable[str]) -> Document:
    """A copy of ``document`` with each ``trainer.recipe.steps=50`` (below spec; the value is YAML) applied."""
    changed = copy.deepcopy(document)
    for text in overrides:
        path, separator, value = text.partition("=")
        if not separator or not path.strip("."):
            raise ManifestError("--set", [f"{text!r} is not path=value, for example trainer.recipe.steps=50"])
        keys = path.strip().removeprefix("spec.").split(".")
        _assign(changed.setdefault("spec", {}), keys, yaml_value(path, value), path)
    return changed


def yaml_value(path: str, text: str) -> Any:
    """What ``--set path=text`` gives the field; raises ManifestError where the text is not YAML."""
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: 2026-13-01 has the form of a date
        quoted = '["…"]' if text.lstrip().startswith("[") else '"…"'
        problem = f"{path}: {text!r} is not YAML: {_yaml_problem(error)}"
        remedy = f"put double quotes around what is a text, inside those of the shell: --set '{path}={quoted}'"
        raise ManifestError("--set", [f"{problem}; {remedy}"]) from None


def _assign(target: Any, keys: list[str], value: Any, path: str) -> None:
    for key, following in zip(keys, [*keys[1:], None], strict=True):
        place: Any = key
        if isinstance(target, list):
            if not key.isdigit() or int(key) >= len(target):
                raise ManifestError("--set", [f"{path}: {key!r} is no place in a list of {len(target)}"])
            place = int(key)
        elif not isinstance(target, dict):
            raise ManifestError("--set", [f"{path}: {key!r} is below a plain value"])
        if following is None:
            target[place] = value
        elif isinstance(target, dict):
            target = target.setdefault(place, {})
        else:
            target = target[place]


def parse(document: Document, source: str) -> TrainingJob:
    """The typed job; raises ManifestError with one sentence per mistake, in the words the API server uses too."""
    problems = list(_frame_problems(document))
    job: TrainingJob | None = None
    try:
        job = TrainingJob.model_validate({"metadata": {}, **document})
    except ValidationError as error:
        problems += [_sentence(dict(item)) for item in error.errors(include_url=False)]
    if problems or job is None:
        raise ManifestError(source, problems)
    return job


def _frame_problems(document: Document) -> Iterable[str]:
    version = document.get("apiVersion")
    if version != constants.API_VERSION:
        yield f"apiVersion: {version!r} is not served; set it to {constants.API_VERSION}"
    for key in document:
        if key not in _TOP_LEVEL:
            yield f"{key}: unknown field{_hint(str(key), _TOP_LEVEL)}"
    metadata = document.get("metadata")
    name = metadata.get("name") if isinstance(metadata, dict) else None
    if not isinstance(name, str) or not name:
        yield "metadata.name: missing; give the job a name"
    elif len(name) > _LONGEST_NAME or not _NAME.fullmatch(name):
        yield (
            f"metadata.name: {name!r} can't be used in the names of pods; use at most {_LONGEST_NAME} characters of "
            "a-z, 0-9 and '-', with a letter or digit at both ends"
        )


def _sentence(error: dict[str, Any]) -> str:
    location = tuple(error["loc"])
    place = ".".join(map(str, location)) or "manifest"
    match error["type"]:
        case "missing":
            return f"{place}: missing; it has no default, so set it"
        case "extra_forbidden":
            return f"{place}: unknown field{_hint(str(location[-1]), _fields_at(location[:-1]))}"
        case "value_error":
            return f"{place}: {str(error['msg']).removeprefix('Value error, ')}"
    return f"{place}: {complaint(error)}"


def complaint(error: dict[str, Any], root: type[BaseModel] = TrainingJob) -> str:
    """What is wrong with the value of a field of ``root``, as a clause: for one error of pydantic."""
    given = error.get("input")
    if error["type"] == "string_pattern_mismatch":
        if words := alternatives(error["ctx"]["pattern"]):
            choice = f"choose one of {', '.join(words)}" if len(words) > 1 else f"write {words[0]}"
            return f"{given!r} is unknown; {choice}"
        field = _field_at(root, error["loc"])
        if examples := field and (field.examples or _examples_in(field.annotation)):
            return f"{given!r} is not of its form; write it like {' or '.join(examples)}"
    shown = f" (it is {given!r})" if isinstance(given, str | int | float | bool | None) else ""
    message = str(error["msg"])
    return f"{message[:1].lower()}{message[1:]}{shown}"


def _fields_at(location: tuple[Any, ...]) -> list[str]:
    """Names on the wire of the model that sits at ``location``; empty where there is none."""
    model: type[BaseModel] | None = TrainingJob
    if location:
        field = _field_at(TrainingJob, location)
        model = _model_in(field.annotation) if field else None
    return [field.alias or name for name, field in model.model_fields.items()] if model else []


def _field_at(root: type[BaseModel], location: tuple[Any, ...]) -> FieldInfo | None:
    """The field of ``root`` that ``location`` leads to, or the list that has it; None where there is none."""
    model: type[BaseModel] | None = root
    field: FieldInfo | None = None
    for key in location:
        if isinstance(key, int):
            continue
        field = next((f for n, f in model.model_fields.items() if key in (n, f.alias)), None) if model else None
        model = _model_in(field.annotation) if field else None
    return field


def _examples_in(annotation: Any) -> list[Any]:
    """Those of the annotated type inside ``X``, ``X | None`` or ``list[X]``."""
    for note in getattr(annotation, "__metadata__", ()):
        if isinstance(note, FieldInfo) and note.examples:
            return note.examples
    return next((examples for part in get_args(annotation) if (examples := _examples_in(part))), [])


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model inside ``X``, ``X | None`` or ``list[X]``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((model for part in get_args(annotation) if (model := _model_in(part))), None)


def _hint(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; known here: {', '.join(sorted(known))}" if known else "; remove it"


def _yaml_problem(error: yaml.YAMLError | ValueError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error)
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}" if mark else str(problem)


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that stands twice: the plain loader takes the last one and says nothing."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key != "<<" and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", key_node.start_mark
                )
            if isinstance(key, str):
                seen.add(key)
        return super().construct_mapping(node, deep)
