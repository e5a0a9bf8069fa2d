"""``lockstep checkpoint``: lists, verifies, exports and removes checkpoints, from anywhere that reaches the store."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from lockstep_api.v1alpha1 import TrainerSpec
from lockstep_cli import checkpoints, manifest, store, target, times
from lockstep_cli.checkpoints import Where, sentences
from lockstep_cli.errors import CliError
from lockstep_cli.output import Output

if TYPE_CHECKING:
    from lockstep_trainer.checkpoint.catalogue import Checkpoint, Job

_STEP_HELP = "a step, or the name of a step folder (default: the newest whole one{})"
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def register(commands: argparse._SubParsersAction[Any]) -> argparse.ArgumentParser:
    """Adds the command."""
    parser: argparse.ArgumentParser = commands.add_parser("checkpoint", help="list, verify, export, remove checkpoints")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    listing = actions.add_parser("ls", help="list jobs with checkpoints, or the checkpoints of one")
    checkpoints.add_arguments(listing)
    listing.set_defaults(handler=handle_ls)

    verify = actions.add_parser("verify", help="compare every byte with its checksum; exit status 1 where one is wrong")
    checkpoints.add_arguments(verify)
    which = verify.add_mutually_exclusive_group()
    which.add_argument("--step", help=_STEP_HELP.format(", and what is newer"))
    which.add_argument("--all", action="store_true", help="all on the chain")
    verify.set_defaults(handler=handle_verify)

    export = actions.add_parser("export", help="write the model in Hugging Face's format")
    checkpoints.add_arguments(export)
    export.add_argument("--step", help=_STEP_HELP.format(""))
    export.add_argument("--to", required=True, metavar="URI", help="folder to write: a path, file:// or s3://")
    export.add_argument(
        "--job",
        metavar="FILE",
        help="the job's manifest, which says what the model is: where a checkpoint of an older release does not",
    )
    export.add_argument(
        "--tokenizer",
        metavar="URI",
        help="a tokenizer.json, or the folder that has one: a path, file:// or s3:// (default: the job's, by URI)",
    )
    export.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="of weights (default: bfloat16)"
    )
    export.add_argument("--force", action="store_true", help="replace the model that is in the folder already")
    export.set_defaults(handler=handle_export)

    remove = actions.add_parser("rm", help="remove a checkpoint, or what is left of torn ones")
    checkpoints.add_arguments(remove)
    what = remove.add_mutually_exclusive_group()
    what.add_argument("--step", help="a step, or the name of a step folder")
    what.add_argument("--garbage", action="store_true", help="all folders that are off the chain for good")
    remove.add_argument(
        "--force", action="store_true", help="also the newest whole one, or one that may be in the making"
    )
    remove.add_argument("--yes", action="store_true", help="do not ask")
    remove.set_defaults(handler=handle_rm)
    return parser


# --- ls -------------------------------------------------------------------------------------------------------------


def handle_ls(arguments: argparse.Namespace, output: Output) -> int:
    """Prints the jobs below a prefix, or a job's checkpoints."""
    from lockstep_trainer.checkpoint.catalogue import jobs, nothing, read_job

    where = checkpoints.find(arguments)
    with sentences(where.uri):
        root = where.open()
        prefixes = jobs(root)
        if not prefixes:
            raise CliError(nothing(root, "no job with checkpoints is in it, or below"))
        found = [(prefix, read_job(root.below(prefix) if prefix else root)) for prefix in prefixes]
    answer = {
        "jobs": [
            {"uri": job.chain.store.uri, "checkpoints": [_as_json(each, job) for each in job.checkpoints]}
            for _, job in found
        ]
    }
    if len(found) == 1:
        (_, job) = found[0]
        chosen = [each for each in job.checkpoints if where.step in ("", each.folder)]
        output.note(Text(job.chain.store.uri, "dim"))
        output.result(answer, _checkpoints_table(chosen, job))
        return 0
    output.result(answer, _jobs_table(found))
    return 0


def _as_json(each: Checkpoint, job: Job) -> dict[str, Any]:
    listed = each.manifest
    return {
        "step": each.state.step,
        "epoch": each.state.epoch,
        "generation": each.state.generation,
        "folder": each.folder,
        "place": each.place.value,
        "newest": job.newest is not None and each.state == job.newest.state,
        "whole": each.whole,
        "removed": each.removed,
        "problem": each.problem or None,
        "bytes": each.size,
        "modified": each.modified,
        "writtenAt": listed.written_at if listed else None,
        "layout": listed.layout.model_dump() if listed else None,
        "verified": list(listed.verified) if listed else None,
        "parent": listed.parent.manifest if listed and listed.parent else None,
    }


def _checkpoints_table(found: Iterable[Checkpoint], job: Job) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading, side in (("STEP", "right"), ("FOLDER", "left"), ("AGE", "right"), ("SIZE", "right")):
        table.add_column(heading, justify="right" if side == "right" else "left", no_wrap=True)
    for heading in ("LAYOUT", "STATE", "PARENT", "VERIFIED"):
        table.add_column(heading, no_wrap=heading != "VERIFIED")
    now = time.time()
    for each in found:
        listed = each.manifest
        written = listed.written_at if listed else each.modified
        parent = (listed.parent.manifest if listed and listed.parent else "").removesuffix("/manifest.json")
        table.add_row(
            str(each.state.step),
            each.folder,
            times.ago(now - written) if written else "",
            size_text(each.size),
            _layout(each),
            _state(each, job),
            parent,
            "; ".join(listed.verified) if listed else "",
        )
    return table


def _state(each: Checkpoint, job: Job) -> Text:
    if each.removed:
        return Text("removed", "dim")
    if each.problem:
        return Text(each.problem, "red")
    if job.newest and each.state == job.newest.state:
        return Text("newest", "green")
    words = {"chain": ("whole", ""), "open": ("not committed", "yellow"), "garbage": ("garbage", "dim")}
    return Text(*words[each.place.value])


def _layout(each: Checkpoint) -> str:
    if each.manifest is None:
        return ""
    degrees = each.manifest.layout.model_dump()
    named = [f"{name} {degree}" for name, degree in degrees.items() if degree > 1 and name not in _NOT_DEGREES]
    return " × ".join(named) or "1 rank"


_NOT_DEGREES = ("world_size", "data_width")


def _jobs_table(found: list[tuple[str, Job]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("JOB", no_wrap=True)
    for heading in ("CHECKPOINTS", "SIZE", "NEWEST STEP", "AGE"):
        table.add_column(heading, justify="right", no_wrap=True)
    now = time.time()
    for prefix, job in found:
        newest = job.newest
        written = newest.manifest.written_at if newest and newest.manifest else None
        table.add_row(
            prefix,
            str(len(job.chained)),
            size_text(sum(each.size for each in job.checkpoints)),
            str(newest.state.step) if newest else "none",
            times.ago(now - written) if written else "",
        )
    return table


# --- verify, export -------------------------------------------------------------------------------------------------


def handle_verify(arguments: argparse.Namespace, output: Output) -> int:
    """Reads all bytes; 1 where one is wrong."""
    where, job = _one_job(arguments)
    name = _named(arguments, where)
    chosen = [_chosen(job, name)] if name and not arguments.all else _newest(job, everything=arguments.all)
    if chosen[0].place.value != "chain":
        raise CliError(
            f"{chosen[0].folder} is off the chain: it was never finished, so nothing says what should be in it"
        )
    if chosen[0].removed:
        raise CliError(f"{chosen[0].folder} was removed: there is nothing to verify")
    result = checkpoints.ask(_request("verify", job, where, chosen), f"verifying {_names(chosen)}", output)
    output.note(Text(job.chain.store.uri, "dim"))
    lines = []
    for found in result["checkpoints"]:
        folder = found["folder"]
        if found["problems"]:
            lines += [Text(f"{folder}/{problem['file']}: {problem['message']}", "red") for problem in found["problems"]]
        else:
            lines.append(
                Text(f"{folder}: {found['files']} files, {size_text(found['bytes'])}, all as they were written")
            )
    removed = [] if name else [each.folder for each in job.checkpoints if each.removed]
    lines += [Text(f"{folder}: removed", "dim") for folder in removed]
    output.result({"uri": job.chain.store.uri, **result, "removed": removed}, Text("\n").join(lines))
    return int(any(found["problems"] for found in result["checkpoints"]))


def _newest(job: Job, *, everything: bool) -> list[Checkpoint]:
    """The newest whole one behind those newer ones that are not, or all on the chain; raises CliError where that is
    nothing to rely on."""
    if everything and job.chained:
        return list(job.chained)
    newest = _chosen(job, None)
    return list(job.chained[: job.chained.index(newest) + 1])


def handle_export(arguments: argparse.Namespace, output: Output) -> int:
    """Writes the model."""
    where, job = _one_job(arguments)
    chosen = _chosen(job, _named(arguments, where))
    trainer = _trainer(arguments, where, chosen)
    to = store.as_uri(arguments.to)
    request = _request("export", job, where, [chosen]) | {
        "trainer": trainer and trainer.to_wire(),
        "to": to,
        "tokenizer": arguments.tokenizer and store.as_uri(arguments.tokenizer),
        "dtype": arguments.dtype,
        "force": arguments.force,
    }
    result = checkpoints.ask(request, f"exporting {chosen.folder}", output)
    text = f"{to}: the model behind step {chosen.state.step}, {result['layers']} layers"
    if not (arguments.tokenizer or (trainer and trainer.tokenizer.uri)):
        text += "; without a tokenizer: --tokenizer names one"
    output.result(result, text)
    return 0


def _trainer(arguments: argparse.Namespace, where: Where, chosen: Checkpoint) -> TrainerSpec | None:
    """The job's, if it is known; raises CliError where it must be and is not."""
    job = where.job
    if arguments.job:
        job = target.load_local(Path(arguments.job)) if target.is_local(arguments.job) else manifest.load(arguments.job)
    if job is None:
        if chosen.manifest is not None and chosen.manifest.model is None:
            raise CliError(
                f"export: {chosen.folder} does not say what the model is: it is one of your own, or an older release "
                "wrote it; add --job with the job's manifest"
            )
        return None
    if job.spec.trainer is None:
        raise CliError(f"{job.name}: the job has spec.command, and only models of spec.trainer are known here")
    return job.spec.trainer


def _request(do: str, job: Job, where: Where, chosen: list[Checkpoint]) -> dict[str, Any]:
    folders = [each.folder for each in chosen]
    return {"do": do, "uri": job.chain.store.uri, "s3": where.s3.to_wire(), "folders": folders}


# --- rm -------------------------------------------------------------------------------------------------------------


def handle_rm(arguments: argparse.Namespace, output: Output) -> int:
    """Removes what was named, after asking."""
    from lockstep_trainer.checkpoint.catalogue import remove
    from lockstep_trainer.checkpoint.garbage import abort_uploads

    where, job = _one_job(arguments)
    name = _named(arguments, where)
    if arguments.garbage and name:
        raise CliError(
            f"rm: --garbage is for a whole job, and {arguments.where} is one checkpoint: leave one of them out"
        )
    if not name and not arguments.garbage:
        raise CliError("rm: name a checkpoint with --step (`lockstep checkpoint ls` shows them), or give --garbage")
    if arguments.garbage:
        chosen = [each for each in job.checkpoints if each.place.value == "garbage"]
    else:
        chosen = [_chosen(job, name)]
    size = sum(each.size for each in chosen)
    if chosen and not arguments.yes:
        _confirm(f"Remove {_names(chosen)} ({size_text(size)}) of {job.chain.store.uri}?", output)
    with sentences(job.chain.store.uri):
        for each in chosen:
            remove(job, each, force=arguments.force)
        uploads = abort_uploads(job.chain, job.known) if arguments.garbage else 0
    removed = [each.folder for each in chosen]
    text = f"removed {_names(chosen)}, {size_text(size)}" if chosen else "no folder is off the chain for good"
    if uploads:
        text += f"; {uploads} unfinished uploads given up"
    output.result({"uri": job.chain.store.uri, "removed": removed, "bytes": size, "uploads": uploads}, text)
    return 0


def _confirm(question: str, output: Output) -> None:
    if output.as_json or not output.console.is_terminal:
        raise CliError("rm: there is nobody to ask; add --yes")
    try:
        answer = output.errors.input(f"{question} [y/N] ", markup=False, emoji=False)
    except EOFError:
        answer = ""
    if answer.strip().lower() not in ("y", "yes"):
        raise CliError("nothing was removed")


# --------------------------------------------------------------------------------------------------------------------


def _one_job(arguments: argparse.Namespace) -> tuple[Where, Job]:
    from lockstep_trainer.checkpoint.catalogue import read_job, single

    where = checkpoints.find(arguments)
    with sentences(where.uri):
        return where, read_job(single(where.open()))


def _named(arguments: argparse.Namespace, where: Where) -> str:
    """The checkpoint that --step names, or the folder that is pointed at; "" where neither does. Raises CliError where
    they are two."""
    from lockstep_trainer.checkpoint.manifest import parse_step_folder

    step: str = arguments.step or ""
    pointed = parse_step_folder(where.step)
    if step and pointed and step not in (where.step, str(pointed.step)):
        raise CliError(f"--step {step}: {arguments.where} is another checkpoint: leave one of them out")
    return where.step or step


def _chosen(job: Job, name: str | None) -> Checkpoint:
    with sentences(job.chain.store.uri):
        if name:
            return job.find(name)
    if job.newest is None:
        uri, there = job.chain.store.uri, list(job.chained)
        raise CliError(
            f"{uri}: none of its checkpoints is whole: {_names(there)}" if there else f"{uri}: no checkpoints"
        )
    return job.newest


def _names(chosen: list[Checkpoint]) -> str:
    names = ", ".join(each.folder for each in chosen[:3])
    return names if len(chosen) <= 3 else f"{names} and {len(chosen) - 3} more"


def size_text(size: float) -> str:
    """Bytes with three figures: 1.21 GiB."""
    for unit in _UNITS:
        if size < 1024 or unit == _UNITS[-1]:
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.3g} {unit}"
