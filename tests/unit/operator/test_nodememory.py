"""The shell around the memory of nodes: nothing that was heard is lost, and people are told."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, cast

import pytest

from lockstep_api.v1alpha1 import Fault, TrainingJob, TrainingJobStatus
from lockstep_operator.errors import ConflictError, UnavailableError
from lockstep_operator.events import EventPoster
from lockstep_operator.kube import KubeClient
from lockstep_operator.nodememory import NodeMemory
from lockstep_operator.plan.actions import Event
from lockstep_operator.plan.nodes.exclusion import Limits
from lockstep_operator.plan.observed import Node
from lockstep_operator.plan.times import rfc3339
from unit.operator.builders import START, make_job


class Api:
    """One ConfigMap and some nodes."""

    def __init__(self) -> None:
        self.config_map: dict[str, Any] | None = None
        self.nodes: dict[str, dict[str, Any]] = {}
        self.conditions: dict[str, list[dict[str, Any]]] = {}
        self.writes = 0
        self.fails: Exception | None = None

    async def create(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return self._write(body)

    async def replace(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        assert self.config_map
        if body["metadata"]["resourceVersion"] != self.config_map["metadata"]["resourceVersion"]:
            raise ConflictError(409, "Conflict", "changed")
        return self._write(body)

    async def get(self, path: str) -> dict[str, Any]:
        return self.nodes[path.rpartition("/")[2]]

    async def patch(self, path: str, body: dict[str, Any], kind: str = "") -> dict[str, Any]:
        if path.endswith("/status"):
            assert kind == "application/strategic-merge-patch+json"  # another one would replace all conditions
            self.conditions[path.split("/")[-2]] = body["status"]["conditions"]
            return {}
        node = self.nodes[path.rpartition("/")[2]]
        node["spec"]["taints"] = body["spec"]["taints"]
        return node

    def _write(self, body: dict[str, Any]) -> dict[str, Any]:
        if self.fails:
            raise self.fails
        self.writes += 1
        self.config_map = {**body, "metadata": {**body["metadata"], "resourceVersion": str(self.writes)}}
        return self.config_map


class Posted:
    """Events on nodes."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []

    async def post_on_node(self, node: str, event: Event) -> None:
        self.events.append((node, event.reason))


def memory(api: Api, posted: Posted, nodes: Mapping[str, Node] | None = None, **options: Any) -> NodeMemory:
    return NodeMemory(
        cast(KubeClient, api),
        cast(EventPoster, posted),
        "lockstep",
        "nodes",
        nodes=lambda: nodes or {},
        limits=options.pop("limits", Limits()),
        clock=lambda: START,
        **options,
    )


def witness(uid: str, *nodes: str, cause: str = "Corruption") -> TrainingJob:
    faults = [Fault(at=rfc3339(START), cause=cause, rung="pod", node=node, pod=f"p-{node}") for node in nodes]
    job = make_job(status=TrainingJobStatus(faults=faults))
    return job.model_copy(update={"metadata": {**job.metadata, "uid": uid}})


def test_a_fault_is_written_once_and_its_node_excluded_and_told() -> None:
    api, posted = Api(), Posted()
    one = memory(api, posted)
    one.learn(witness("a", "n"))
    asyncio.run(one.review())
    one.learn(witness("a", "n"))
    asyncio.run(one.review())
    assert (api.writes, one.excluded(), posted.events) == (1, {"n"}, [("n", "NodeExcluded")])


def test_what_could_not_be_written_is_written_later() -> None:
    api = Api()
    one = memory(api, Posted())
    one.learn(witness("a", "n"))
    api.fails = UnavailableError(503, "", "away")
    with pytest.raises(UnavailableError):
        asyncio.run(one.review())
    assert one.excluded() == frozenset()  # what nobody else would know of is not acted upon
    api.fails = None
    asyncio.run(one.review())
    assert one.excluded() == {"n"}


def test_an_administrator_who_was_faster_is_not_overwritten() -> None:
    api = Api()
    one = memory(api, Posted())
    asyncio.run(one.review())
    assert api.config_map
    theirs = {"mine": '{"exclusion": {"since": "2023-11-14T22:13:20Z", "by": "administrator"}}'}
    api.config_map = {**api.config_map, "data": theirs, "metadata": {**api.config_map["metadata"]}}
    api.config_map["metadata"]["resourceVersion"] = "5"
    one.learn(witness("a", "n"))
    with pytest.raises(ConflictError):
        asyncio.run(one.review())
    one._changed(None, one._informer._trim(api.config_map))  # the watch brings it
    api.writes = 5
    asyncio.run(one.review())
    assert one.excluded() == {"mine", "n"}
    assert set(api.config_map["data"]) == {"mine", "n"}


def test_the_breaker_tells_of_each_node_that_it_keeps_in_use() -> None:
    posted = Posted()
    one = memory(Api(), posted, limits=Limits(per_hour=1))
    one.learn(witness("a", "n", "m"))
    asyncio.run(one.review())
    asyncio.run(one.review())
    assert posted.events == [("m", "NodeExcluded"), ("n", "NodeExclusionHeld")]
    assert "nodes.excludePerHour" in one.held


def test_taints_follow_and_nothing_else_on_the_node_changes() -> None:
    api = Api()
    other = {"key": "nvidia.com/gpu", "effect": "NoSchedule"}
    ours = {"key": "lockstep.dev/excluded", "value": "score", "effect": "NoSchedule"}
    for name, taints in (("bad", [other]), ("good", [other, ours])):
        api.nodes[name] = {"metadata": {"resourceVersion": "1"}, "spec": {"taints": taints}}
    one = memory(api, Posted(), {"bad": Node("bad"), "good": Node("good", taint="score")}, taint=True)
    one.learn(witness("a", "bad"))
    asyncio.run(one.review())
    assert api.nodes["bad"]["spec"]["taints"] == [other, ours]
    assert api.nodes["good"]["spec"]["taints"] == [other]


def test_a_condition_says_that_a_node_is_excluded_and_when_it_is_no_more() -> None:
    api = Api()
    nodes = {
        "bad": Node("bad"),
        "told": Node("told", marked="True"),
        "good": Node("good", marked="False"),
        "better": Node("better"),
    }
    one = memory(api, Posted(), nodes, condition=True, limits=Limits(share=1))
    one.learn(witness("a", "bad"))
    asyncio.run(one.review())
    assert set(api.conditions) == {"bad", "told"}  # no other has anything new to say
    (bad,), (told,) = api.conditions["bad"], api.conditions["told"]
    assert (bad["type"], bad["status"], bad["reason"]) == ("LockstepExcluded", "True", "TooManyFaults")
    assert "Corruption" in bad["message"]
    assert (told["status"], told["reason"]) == ("False", "NotExcluded")


def test_without_leave_no_node_is_touched() -> None:
    api = Api()
    one = memory(api, Posted(), {"bad": Node("bad")})
    one.learn(witness("a", "bad"))
    asyncio.run(one.review())  # KeyError if it asked for the node
    assert one.excluded() == {"bad"}
