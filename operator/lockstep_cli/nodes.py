"""The memory of nodes, as an administrator sees and changes it: a ConfigMap beside the operator."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from rich.table import Table

from lockstep_api import constants
from lockstep_cli import times
from lockstep_cli.cluster import connect
from lockstep_cli.errors import CliError, NotFoundError
from lockstep_operator import errors, kube
from lockstep_operator.kube import KubeClient
from lockstep_operator.noderecords import Stored, read, write
from lockstep_operator.plan.nodes import exclusion, score
from lockstep_operator.plan.nodes.records import BY_SCORE, Exclusion, Records
from lockstep_operator.plan.times import rfc3339

__all__ = ["clear", "ending", "exclude", "fetch", "rfc3339", "table", "wire"]

ATTEMPTS = 5
"""The operator writes it too; whoever was slower reads again."""


async def fetch(arguments: argparse.Namespace) -> Stored:
    """What is remembered; raises CliError."""
    async with connect(arguments) as (client, _):
        return await _find(client, arguments.namespace)


async def exclude(arguments: argparse.Namespace, node: str, reason: str, until: float | None, now: float) -> None:
    """Keeps new pods away from a node of the cluster; raises CliError."""
    async with connect(arguments) as (client, _):
        try:
            await client.get(kube.NODES.path(name=node))
        except errors.NotFoundError:
            raise NotFoundError(f"{node}: the cluster has no such node; `kubectl get nodes` lists them") from None
        except errors.RefusedError:
            pass  # whoever may not read nodes is believed
        await _change(
            client,
            arguments.namespace,
            lambda records: exclusion.exclude(records, node, reason=reason, until=until, now=now),
            now,
        )


async def clear(arguments: argparse.Namespace, node: str, now: float) -> None:
    """Forgives a node; raises CliError."""

    def cleared(records: Records) -> Records:
        try:
            return exclusion.clear(records, node, now)
        except KeyError:
            raise NotFoundError(f"{node}: nothing speaks against it; `lockstep nodes` lists what is known") from None

    async with connect(arguments) as (client, _):
        await _change(client, arguments.namespace, cleared, now)


async def _change(client: KubeClient, namespace: str | None, change: Callable[[Records], Records], now: float) -> None:
    for _ in range(ATTEMPTS):
        stored = await _find(client, namespace)
        manifest = write(stored, change(stored.records), now)
        try:
            await client.replace(kube.CONFIG_MAPS.path(stored.namespace, stored.name), manifest)
        except errors.ConflictError:
            continue
        return
    raise CliError("the records of nodes changed each time before they could be written; try again")


async def _find(client: KubeClient, namespace: str | None) -> Stored:
    """The ConfigMap, by its label."""
    page = await client.list(kube.CONFIG_MAPS.path(namespace), labels=f"{constants.LABEL_NODE_MEMORY}=true")
    where = f"namespace {namespace}" if namespace else "any namespace"
    if not page.items:
        raise NotFoundError(
            f"no operator remembers nodes in {where}: it makes its ConfigMap when it starts; is one running? "
            "(kubectl get deployments -A -l app.kubernetes.io/name=lockstep)"
        )
    if len(page.items) > 1:
        found = ", ".join(sorted(one["metadata"]["namespace"] for one in page.items))
        raise CliError(f"there are several operators, in {found}; name one by -n")
    return read(page.items[0])


def ending(until: float | None) -> str:
    """``until …``."""
    return "until `lockstep nodes clear`" if until is None else f"until {rfc3339(until)}"


def wire(records: Records, now: float) -> dict[str, Any]:
    """Everything, for programs."""
    values, out = score.scores(records, now), set(exclusion.excluded(records, now))
    return {
        "threshold": score.THRESHOLD,
        "nodes": [
            {
                "node": name,
                "score": round(values[name], 2),
                "excluded": name in out,
                **_exclusion(record.exclusion if name in out else None),
                "faults": [
                    {"at": rfc3339(one.at), "cause": one.cause, "job": one.job, "pod": one.pod, "weight": one.weight}
                    for one in record.faults
                ],
            }
            for name, record in sorted(records.items(), key=lambda entry: (-values[entry[0]], entry[0]))
        ],
    }


def _exclusion(one: Exclusion | None) -> dict[str, Any]:
    if one is None:
        return {}
    return {
        "by": one.by,
        "reason": one.reason,
        "since": rfc3339(one.since),
        **({} if one.until is None else {"until": rfc3339(one.until)}),
    }


def table(records: Records, now: float) -> Table | str:
    """For people: the excluded ones first, then by score."""
    valid = score.counted(records, now)
    values = {name: score.score(faults, now) for name, faults in valid.items()}
    out = set(exclusion.excluded(records, now))
    if not any(values[name] or name in out for name in records):
        return "Nothing speaks against any node."
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("NODE", "SCORE", "EXCLUDED", "FAULTS", "LAST"):
        shown.add_column(column)
    for name in sorted(records, key=lambda name: (name not in out, -values[name], name)):
        if not values[name] and name not in out:
            continue
        last = max((fault.at for fault in valid[name]), default=None)
        shown.add_row(
            name,
            f"{values[name]:.1f}",
            _since(records[name].exclusion, exclusion.release_at(valid[name], now)) if name in out else "",
            ", ".join(sorted({fault.cause for fault in valid[name]})),
            "" if last is None else f"{times.ago(now - last)} ago",
        )
    return shown


def _since(one: Exclusion | None, decayed: float) -> str:
    if one is None:
        return ""
    if one.by == BY_SCORE:
        return f"until {rfc3339(decayed)}, by its score"
    reason = f": {one.reason}" if one.reason else ""
    return f"{ending(one.until)}, by {one.by}{reason}"
