"""Readers behind the generated pages: what they miss would be missing from the reference without a word."""

from __future__ import annotations

import re

import requirements as pins
from reference import Value, agent_metrics, cli_page, operator_metrics, read_constants, read_values


def test_values_with_their_comments_and_defaults() -> None:
    text = """
# How many.
# Really.
replicas: 1

image:
  # Where from.
  repository: a/b
# All of it.
resources:
  limits: {memory: 1Gi}
bare: x
"""
    assert read_values(text) == [
        Value("replicas", "1", "How many. Really."),
        Value("image.repository", "a/b", "Where from."),
        Value("resources", "{limits: {memory: 1Gi}}", "All of it."),
        Value("bare", "x", ""),
    ]


def test_metrics_with_their_labels() -> None:
    metrics = {metric.name: metric for metric in [*agent_metrics(), *operator_metrics()]}
    job = ("namespace", "job_name")
    assert (metrics["lockstep_faults_total"].kind, metrics["lockstep_faults_total"].labels) == (
        "counter",
        (*job, "cause", "rung"),
    )
    assert metrics["lockstep_job_ledger_gpu_seconds"].labels == (*job, "class")
    assert metrics["lockstep_operator_reconcile_errors_total"].labels == ("error",)
    assert metrics["lockstep_operator_reconcile_seconds"].kind == "histogram"
    assert all(metric.text for metric in metrics.values())


def test_a_command_that_works_without_an_action_has_a_section_as_its_actions_have() -> None:
    headings = [line for line in cli_page().splitlines() if line.startswith("## lockstep nodes")]
    assert headings == ["## lockstep nodes", "## lockstep nodes exclude", "## lockstep nodes clear"]


def test_constants_with_their_docstrings() -> None:
    known = read_constants()
    assert known["CONDITION_READY"] == ("Ready", "All members hold a slot and training steps advance.")
    assert known["AGENT_PORT"][0] == "29400"


def test_every_pin_has_a_hash() -> None:
    for pinned in pins.LISTS:
        blocks = re.split(r"^[\w.-]+==", pinned.path.read_text(), flags=re.MULTILINE)[1:]
        assert len(blocks) > 10, pinned.name
        assert all("--hash=sha256:" in block for block in blocks), pinned.name


def test_images_and_tests_run_the_same_versions() -> None:
    def versions(pinned: pins.PinnedList) -> set[str]:
        lines = pinned.path.read_text().splitlines()
        return {line.split(" ")[0] for line in lines if "==" in line and not line.startswith((" ", "#"))}

    for pinned in pins.LISTS:
        assert versions(pinned) <= versions(pins.DEV), pinned.name


def test_torch_is_in_the_trainer_image_only_and_kopf_in_the_operators_only() -> None:
    def names(pinned: pins.PinnedList) -> set[str]:
        return {line.partition("==")[0] for line in pinned.path.read_text().splitlines() if "==" in line}

    by_name = {pinned.name: names(pinned) for pinned in pins.LISTS}
    assert "torch" in by_name["trainer"] & by_name["torch"]
    assert "torch" not in by_name["operator"]
    assert "kopf" in by_name["operator"]
    assert "kopf" not in by_name["trainer"]
