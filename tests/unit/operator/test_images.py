"""A job's pods run one image: a successor gets its peers' one, and a tag that was moved meanwhile is told."""

from __future__ import annotations

from dataclasses import replace

from lockstep_api import constants
from lockstep_api.v1alpha1 import Condition
from lockstep_cli.explain import why
from lockstep_operator.plan import pods
from lockstep_operator.plan.actions import NewPod
from unit.operator.builders import World, make_job

NAME = "registry/trainer:main"
OLD, NEW = (f"registry/trainer@sha256:{digit * 64}" for digit in "ab")


def running(*images: str, name: str = NAME) -> World:
    """A job of a pod for each of these images."""
    world = World(make_job(nodes=len(images), spares=0))
    world.train(step=10)
    run(world, *images, name=name)
    return world


def run(world: World, *images: str, name: str = NAME) -> None:
    current = sorted((pod for pod in world.pods.values() if not pod.deleting), key=lambda pod: pod.ordinal)
    for pod, image in zip(current, images, strict=True):
        world.pods[pod.name] = replace(pod, image=name, image_id=image)
    world.settle()


def condition(world: World) -> Condition | None:
    found = [one for one in world.status.conditions if one.type == constants.CONDITION_MIXED_IMAGES]
    return found[0] if found else None


def told(world: World) -> int:
    return [event.reason for event in world.events].count("MixedImages")


def test_a_successor_is_made_with_the_image_of_the_jobs_other_pods() -> None:
    """The operator was upgraded meanwhile, and its own default is another image."""
    world = running(OLD, OLD, OLD)
    del world.pods[world.pod_of(1).name]
    (new,) = world.plan().create
    assert new.image == NAME
    upgraded = pods.PodDefaults(image="registry/trainer:next")
    assert pods.render(world.job, new, upgraded)["spec"]["containers"][0]["image"] == NAME
    named = make_job(template={"spec": {"containers": [{"name": "trainer", "image": "own:1"}]}})
    assert pods.render(named, new, upgraded)["spec"]["containers"][0]["image"] == "own:1"


def test_the_first_pods_are_made_with_the_operators_default() -> None:
    world = World(make_job(nodes=2))
    assert {pod.image for pod in world.plan().create} == {""}
    rendered = pods.render(world.job, NewPod("run-0-0", 0, 0), pods.PodDefaults(image="registry/trainer:next"))
    assert rendered["spec"]["containers"][0]["image"] == "registry/trainer:next"


def test_a_tag_that_was_moved_is_a_condition_an_event_and_an_answer_to_why() -> None:
    world = running(OLD, OLD, NEW)
    found = condition(world)
    assert found is not None
    assert (found.status, found.reason) == ("True", "ImageMoved")
    assert f"{NAME}: bbbbbbbbbbbb in {world.pod_of(2).name}, aaaaaaaaaaaa in 2 more." in found.message
    assert found.message in why(world.job, world.now)
    assert told(world) == 1
    run(world, OLD, OLD, OLD)
    ended = condition(world)
    assert ended is not None
    assert ended.status == "False"
    assert told(world) == 1


def test_pods_of_one_image_have_no_such_condition() -> None:
    assert condition(running(OLD, OLD)) is None


def test_an_image_that_was_pulled_and_one_that_was_loaded_are_not_compared() -> None:
    """One image may go by its registry's digest on a node, and by its own on another one."""
    loaded, other = (f"sha256:{digit * 64}" for digit in "cd")
    assert condition(running(OLD, loaded)) is None
    assert condition(running(OLD, loaded, other)) is not None


def test_a_pod_that_does_not_run_yet_is_not_compared() -> None:
    world = running(OLD, OLD)
    victim = world.pod_of(1)
    world.pods[victim.name] = replace(victim, running=False, image_id=NEW)
    world.settle()
    assert condition(world) is None
