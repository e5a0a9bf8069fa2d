"""``lockstep model``: what a built-in architecture consists of and what it needs, without allocating anything."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import ValidationError
from rich.console import Group
from rich.table import Table
from rich.text import Text

from lockstep_api.v1alpha1 import ParallelismSpec
from lockstep_cli import manifest
from lockstep_cli.errors import CliError
from lockstep_cli.output import Output
from lockstep_trainer.errors import UserError
from lockstep_trainer.model.config import DecoderConfig
from lockstep_trainer.model.flops import training_flops_per_token
from lockstep_trainer.model.memory import Memory, Work, memory_by_pipeline_rank, stored_elements
from lockstep_trainer.model.presets import PRESETS, described
from lockstep_trainer.model.weights import Weight, parameter_count, weights
from lockstep_trainer.parallel.layout import Layout

_GIB = 2**30
_SHOWN_RANKS = 8  # of a long pipeline only the ends and the fullest are shown
_DEGREES = {
    "replicate": "copies of the sharded model",
    "shard": "ranks that share one copy of the weights (default: what the others leave of --gpus)",
    "context": "ranks that share a sequence in attention, too",
    "tensor": "ranks that share each matrix product",
    "pipeline": "ranks that share the layers",
    "expert": "ranks that share the experts of a layer; taken from shard × context × tensor",
}


def register(commands: argparse._SubParsersAction[Any]) -> argparse.ArgumentParser:
    """Adds the command."""
    parser: argparse.ArgumentParser = commands.add_parser("model", help="describe the built-in architectures")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="list the built-in architectures")
    listing.set_defaults(handler=handle_list)
    describe = actions.add_parser("describe", help="show every weight, and the memory of a GPU at a layout")
    _add_describe_arguments(describe)
    describe.set_defaults(handler=handle_describe)
    for action in (listing, describe):
        action.add_argument("--output", choices=("text", "json"), default=argparse.SUPPRESS, help="form of the answer")
    return parser


def _add_describe_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("preset", metavar="PRESET", help="name of the architecture, as in trainer.model.preset")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="change a field: layers=6")
    parser.add_argument("--all", action="store_true", help="a line for each weight of each layer")
    layout = parser.add_argument_group("layout, as in spec.parallelism")
    layout.add_argument(
        "--gpus", type=int, default=None, metavar="N", help="GPUs in all (default: as many as the degrees make)"
    )
    for degree, meaning in _DEGREES.items():
        layout.add_argument(f"--{degree}", type=int, default=None, metavar="N", help=meaning)
    layout.add_argument("--schedule", default="1F1B", help="of the pipeline (default: 1F1B)")
    layout.add_argument(
        "--stages-per-rank", type=int, default=None, metavar="N", help="pieces of the model on each pipeline rank"
    )
    layout.add_argument(
        "--context-method", choices=("allGather", "ulysses"), default="allGather", help="how attention crosses ranks"
    )
    work = parser.add_argument_group("work, as in trainer.recipe")
    work.add_argument("--sequence-length", type=int, default=8192, metavar="N", help="tokens (default: 8192)")
    work.add_argument("--micro-batch-size", type=int, default=1, metavar="N", help="samples (default: 1)")
    work.add_argument(
        "--global-batch-tokens", type=int, default=None, metavar="N", help="default: the fewest that the schedule takes"
    )
    work.add_argument(
        "--activation-checkpointing",
        choices=("none", "selective", "full"),
        default="none",
        help="what is recomputed in the backward pass (default: none)",
    )
    work.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw", help="default: adamw")
    work.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="default: bf16")


# --- list ------------------------------------------------------------------------------------------------------------


def handle_list(_arguments: argparse.Namespace, output: Output) -> int:
    """Prints the presets."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("PRESET", "PARAMETERS", "ACTIVE"):
        table.add_column(heading, justify="left" if heading == "PRESET" else "right", no_wrap=True)
    table.add_column("", no_wrap=True)
    found = []
    for name, preset in PRESETS.items():
        total, active = parameter_count(preset.config), parameter_count(preset.config, active=True)
        found.append({"name": name, "about": preset.about, "parameters": total, "activeParameters": active})
        table.add_row(name, _short(total), _short(active) if active != total else "", preset.about)
    output.result({"presets": found}, table)
    return 0


# --- describe --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Row:
    """Weights of the same name and shape in consecutive layers."""

    name: str
    weight: Weight
    times: int


def handle_describe(arguments: argparse.Namespace, output: Output) -> int:
    """Prints the weights and the memory."""
    try:
        config = described(arguments.preset, dict(map(_assignment, arguments.set)))
        layout = _layout(arguments)
        work = _work(arguments, layout)
        layout.check(config, sequence_length=work.sequence_length, micro_batches=work.micro_batches)
        ranks = memory_by_pipeline_rank(config, layout, work)
    except UserError as error:
        raise CliError(f"model describe: {error}") from None
    rows = [_Row(weight.name, weight, 1) for weight in weights(config)]
    text = Group(
        _heading(arguments.preset, config, layout, work),
        Text(),
        _weights_table(rows if arguments.all else _grouped(config), layout),
        Text(),
        _memory_table(ranks),
    )
    output.result(_as_json(arguments.preset, config, layout, work, ranks), text)
    return 0


def _assignment(text: str) -> tuple[str, Any]:
    name, separator, value = text.partition("=")
    if not separator:
        raise CliError(f"--set {text}: write FIELD=VALUE, for example layers=6")
    return name, manifest.yaml_value(name, value)


def _layout(arguments: argparse.Namespace) -> Layout:
    fields = {degree: getattr(arguments, degree) for degree in _DEGREES if getattr(arguments, degree) is not None}
    named = {"schedule": arguments.schedule, "stages_per_rank": arguments.stages_per_rank}
    try:
        spec = ParallelismSpec(**fields, **named, context_method=arguments.context_method)
    except ValidationError as error:
        problem = error.errors()[0]
        raise CliError(f"--{'-'.join(str(part) for part in problem['loc'])}: {problem['msg']}") from None
    degrees = spec.replicate * (spec.shard or 1) * spec.tensor * spec.pipeline * spec.context
    gpus = degrees if arguments.gpus is None else arguments.gpus
    if gpus < 1:
        raise CliError(f"--gpus {gpus}: write a number from 1")
    return Layout.of(spec, gpus)


def _work(arguments: argparse.Namespace, layout: Layout) -> Work:
    for name in ("sequence_length", "micro_batch_size"):
        if getattr(arguments, name) < 1:
            raise CliError(f"--{name.replace('_', '-')} {getattr(arguments, name)}: write a number from 1")
    unit = arguments.sequence_length * arguments.micro_batch_size * layout.data_width
    if arguments.global_batch_tokens is None:
        micro_batches = layout.fitting(layout.stages if layout.pipeline > 1 else 1)
    elif arguments.global_batch_tokens < unit or arguments.global_batch_tokens % unit:
        raise CliError(
            f"--global-batch-tokens {arguments.global_batch_tokens}: {layout.data_width} data-parallel ranks take "
            f"multiples of {unit} tokens (ranks × samples × sequence length)"
        )
    else:
        micro_batches = arguments.global_batch_tokens // unit
    return Work(
        sequence_length=arguments.sequence_length,
        micro_batch=arguments.micro_batch_size,
        micro_batches=micro_batches,
        recompute=arguments.activation_checkpointing,
        optimizer=arguments.optimizer,
        precision=arguments.precision,
    )


def _grouped(config: DecoderConfig) -> list[_Row]:
    """One row for each weight of consecutive layers that are alike."""
    dense = config.dense_layers if config.experts else config.layers
    rows = [_Row(weight.name, weight, 1) for weight in weights(config, (), last=False)]
    for layers in (range(min(dense, config.layers)), range(dense, config.layers)):
        if layers:
            name = f"{layers[0]}" if len(layers) == 1 else f"{{{layers[0]}…{layers[-1]}}}"
            for weight in weights(config, layers[:1], first=False, last=False):
                rows.append(_Row(weight.name.replace(f".{layers[0]}.", f".{name}.", 1), weight, len(layers)))
    tied = config.tie_embeddings  # the same weight as at the start
    return rows + [_Row(w.name, w, 1) for w in weights(config, (), first=False) if not (tied and "embedding" in w.name)]


# --- text ------------------------------------------------------------------------------------------------------------


def _heading(preset: str, config: DecoderConfig, layout: Layout, work: Work) -> Table:
    total, active = parameter_count(config), parameter_count(config, active=True)
    flops = training_flops_per_token(config, work.sequence_length)
    degrees = " × ".join(f"{name} {getattr(layout, name)}" for name in list(_DEGREES)[:-1] if getattr(layout, name) > 1)
    experts = f", expert {layout.expert}" if layout.expert > 1 else ""
    schedule = f", {layout.schedule}" if layout.pipeline > 1 else ""
    grid = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(no_wrap=True)
    grid.add_row("model", f"{preset}: {PRESETS[preset].about}")
    grid.add_row("parameters", f"{total:,}" + (f", {active:,} of them for a token" if active != total else ""))
    grid.add_row("vocabulary", f"{config.vocab_size:,}; a job's is its tokenizer's")
    grid.add_row("training", f"{flops / 1e9:,.2f} GFLOP per token at {work.sequence_length:,} tokens")
    grid.add_row("layout", f"{_plural(layout.world_size, 'GPU')}{': ' if degrees else ''}{degrees}{experts}{schedule}")
    grid.add_row(
        "step",
        f"{_plural(work.micro_batches, 'micro-batch', 'es')} of {_plural(work.micro_batch, 'sample')} on each of "
        f"{_plural(layout.data_width, 'data-parallel rank')}, activation checkpointing {work.recompute}, "
        f"{work.precision}, {work.optimizer}",
    )
    return grid


def _weights_table(rows: Iterable[_Row], layout: Layout) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("WEIGHT", no_wrap=True)
    pipeline = layout.pipeline > 1  # then no GPU has all layers
    for heading in ("SHAPE", "LAYERS", "PARAMETERS", "PER GPU AND LAYER" if pipeline else "PER GPU"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        shape = " × ".join(map(str, row.weight.shape))
        own = stored_elements(row.weight, layout) * (1 if pipeline else row.times)
        table.add_row(row.name, shape, str(row.times), f"{row.weight.count * row.times:,}", f"{own:,}")
    return table


def _memory_table(ranks: Sequence[Memory]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("GiB PER GPU" if len(ranks) == 1 else "GiB, PIPELINE RANK", no_wrap=True)
    names = list(asdict(ranks[0]))
    for name in (*names, "total"):
        table.add_column(name.upper(), justify="right", no_wrap=True)
    shown = range(len(ranks))
    fullest = max(shown, key=lambda rank: ranks[rank].total)
    chosen = shown if len(ranks) <= _SHOWN_RANKS else sorted({0, 1, fullest, len(ranks) - 1})
    for rank in chosen:
        values = [getattr(ranks[rank], name) / _GIB for name in names]
        label = "each" if len(ranks) == 1 else str(rank)
        table.add_row(label, *(f"{value:.2f}" for value in values), Text(f"{ranks[rank].total / _GIB:.2f}", "bold"))
    return table


def _as_json(preset: str, config: DecoderConfig, layout: Layout, work: Work, ranks: Sequence[Memory]) -> dict[str, Any]:
    return {
        "preset": preset,
        "config": asdict(config),
        "parameters": parameter_count(config),
        "activeParameters": parameter_count(config, active=True),
        "trainingFlopsPerToken": training_flops_per_token(config, work.sequence_length),
        "layout": asdict(layout),
        "work": asdict(work),
        "weights": [
            {
                "name": weight.name,
                "shape": list(weight.shape),
                "count": weight.count,
                "perGpu": stored_elements(weight, layout),
            }
            for weight in weights(config)
        ],
        "memory": [{**asdict(rank), "total": rank.total} for rank in ranks],
    }


def _short(number: float) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return str(number)


def _plural(number: int, noun: str, ending: str = "s") -> str:
    return f"{number:,} {noun}{ending if number != 1 else ''}"
