"""The checker must pass an exact run and catch every way in which a log can be wrong. Runs here are made up."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import pytest
from awscrt.checksums import crc64nvme

from checker.check import check
from checker.order import Order, permuted, splitmix64
from checker.stores import MemoryObjects

PER_STEP, WIDTH = 8, 4
RULE: dict[str, Any] = {
    "seed": 7,
    "sources": [{"name": "a", "samples": 5, "data": "a"}, {"name": "b", "samples": 17, "data": "b"}],
    "stages": [{"first": 0, "weights": [0.25, 0.75]}, {"first": 20, "weights": [1.0, 1.0]}],  # in the midst of step 3
    "batches": [{"step": 1, "first": 0, "samples": PER_STEP}],
    "data": "ab",
}
ORDER = Order(RULE)

Line = dict[str, Any]
Tamper = Callable[[list[Line]], list[Line]]


def make_run(tamper: Tamper = lambda lines: lines, *, rank: int = 1, link: int = 1) -> MemoryObjects:
    """Two states at steps 3 and 6; steps 3 and 4 were done twice. ``tamper`` changes one rank's log of one state
    before it is committed, so that checksums agree and only the content can give it away."""
    objects = MemoryObjects()
    parent = None
    for number, (first, last, term) in enumerate([(1, 3, (1, 1)), (4, 6, (1, 2))]):
        folder = f"step-{last}-e{term[0]}-g{term[1]}"
        files = []
        for own in range(WIDTH):
            lines = [_line(step, own, term) for step in range(first, last + 1)]
            if (own, number) == (rank, link):
                lines = tamper(lines)
            content = "".join(json.dumps(line) + "\n" for line in lines).encode()
            objects[f"{folder}/samples-r{own}.jsonl"] = content
            files.append(_entry(f"samples-r{own}.jsonl", content))
        parent = commit(objects, last, term, parent=parent, files=files)
    objects["journal/e1-g1-0.jsonl"] = _journal([1, 2, 3, 4], 1)
    objects["journal/e1-g2-0.jsonl"] = _journal([4, 5, 6], 2)
    return objects


def commit(objects: MemoryObjects, step: int, term: tuple[int, int], *, parent: Line | None, files: list[Line]) -> Line:
    """Writes manifest and latest; the manifest's point."""
    folder = f"step-{step}-e{term[0]}-g{term[1]}"
    state = {"step": step, "epoch": term[0], "generation": term[1]}
    sampler = {**RULE, "steps": step, "drawn": step * PER_STEP}
    manifest = {"state": state, "parent": parent, "files": files, "layout": {"data_width": WIDTH}, "sampler": sampler}
    content = json.dumps(manifest).encode()
    objects[f"{folder}/manifest.json"] = content
    point = {"state": state, "manifest": f"{folder}/manifest.json", "sha256": hashlib.sha256(content).hexdigest()}
    objects[f"latest.{step}"] = json.dumps({"point": point}).encode()
    return point


def _line(step: int, rank: int, term: tuple[int, int]) -> Line:
    share = PER_STEP // WIDTH
    part = ORDER.of_step(step)[rank * share : (rank + 1) * share]
    return {
        "step": step,
        "epoch": term[0],
        "generation": term[1],
        "rank": rank,
        "first": (step - 1) * PER_STEP + rank * share,
        "sources": [source for source, _ in part],
        "samples": [sample for _, sample in part],
    }


def _entry(name: str, content: bytes) -> Line:
    return {"name": name, "size": len(content), "crc64nvme": f"{crc64nvme(content):016x}"}


def _journal(steps: list[int], generation: int) -> bytes:
    lines = [{"kind": "step", "at": 0, "epoch": 1, "generation": generation, "step": step} for step in steps]
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def _set(index: int, **fields: Any) -> Tamper:
    return lambda lines: [{**line, **fields} if i == index else line for i, line in enumerate(lines)]


def test_an_exact_run_passes_and_steps_done_again_are_counted_apart() -> None:
    verdict = check(make_run(), steps=6)
    assert verdict.exact, verdict
    assert (verdict.steps, verdict.samples, verdict.states, verdict.recomputed, verdict.terms) == (6, 48, 2, 1, 2)


@pytest.mark.parametrize(
    ("tamper", "says"),
    [
        (lambda lines: lines[1:], "stands 0 times"),
        (lambda lines: [*lines, lines[-1]], "stands 2 times"),
        (_set(1, samples=_line(5, 0, (1, 2))["samples"]), "step 5, rank 1 consumed"),
        (_set(1, first=(5 - 1) * PER_STEP), "step 5, rank 1 consumed"),
        (lambda lines: [{**line, "sources": line["sources"][::-1]} for line in lines], "rank 1 consumed"),
        (lambda lines: [{**line, "samples": line["samples"][::-1]} for line in lines], "step 4, rank 1 consumed"),
        (_set(0, samples=_line(3, 1, (1, 1))["samples"]), "samples were lost"),
        (_set(0, step=3), "its steps are 4 to 6"),
        (_set(2, step=7), "its steps are 4 to 6"),
        (_set(0, rank=2), "a line of rank 2"),
        (_set(0, generation=1), "in different generations"),
        (_set(0, generation=3), "newer generation"),
    ],
    ids=[
        "a step is missing", "a step stands twice", "another rank's part", "another place", "another source",
        "order within a part", "old samples",
        "a step before the state", "a step beyond the state", "another rank's line", "an older generation",
        "a newer generation",
    ],
)  # fmt: skip
def test_a_wrong_log_is_caught(tamper: Tamper, says: str) -> None:
    verdict = check(make_run(tamper))
    assert not verdict.exact
    assert says in str(verdict)


def test_a_log_changed_after_its_commit_is_caught() -> None:
    objects = make_run()
    objects["step-3-e1-g1/samples-r0.jsonl"] += b"\n"
    assert "size or checksum differ" in str(check(objects))


@pytest.mark.parametrize("gone", ["step-3-e1-g1/samples-r2.jsonl", "step-3-e1-g1/manifest.json", "latest"])
def test_missing_objects_are_caught(gone: str) -> None:
    objects = make_run()
    for key in [key for key in objects if key.startswith(gone)]:
        del objects[key]
    assert not check(objects).exact


def test_a_manifest_that_was_not_the_committed_one_is_caught() -> None:
    objects = make_run()
    objects["step-3-e1-g1/manifest.json"] += b" "
    assert "its checksum differs" in str(check(objects))


def test_a_run_that_stopped_early_is_caught() -> None:
    assert "ends at step 6, not 9" in str(check(make_run(), steps=9))


def test_a_journal_beyond_the_last_commit_is_caught() -> None:
    objects = make_run()
    objects["journal/e1-g2-1.jsonl"] = _journal([7], 2)
    assert "beyond the newest committed state" in str(check(objects))
    assert check(objects, ended=False).exact, "a suspended job is to go on"


def test_splitmix64_gives_the_published_sequence() -> None:
    # First outputs for seed 1234567, as in the reference implementation's test vectors: state advances by the gamma.
    gamma, state, outputs = 0x9E3779B97F4A7C15, 1234567, []
    for _ in range(3):
        outputs.append(splitmix64(state))
        state = (state + gamma) % (1 << 64)
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_a_state_that_counts_other_samples_is_caught() -> None:
    objects = make_run()
    parent = {"step": 3, "epoch": 1, "generation": 1}
    folder = "step-6-e1-g2"
    manifest = json.loads(objects[f"{folder}/manifest.json"])
    assert manifest["parent"]["state"] == parent
    manifest["sampler"]["drawn"] -= PER_STEP
    content = json.dumps(manifest).encode()
    objects[f"{folder}/manifest.json"] = content
    point = {**manifest, "manifest": f"{folder}/manifest.json", "sha256": hashlib.sha256(content).hexdigest()}
    objects["latest.6"] = json.dumps({"point": point}).encode()
    assert "says that 40 samples were consumed, and its steps have 48" in str(check(objects))


def test_a_permutation_is_one_and_keys_differ() -> None:
    first, second = ([permuted(place, 100, secret) for place in range(100)] for secret in (1, 2))
    assert sorted(first) == sorted(second) == list(range(100))
    assert first != second


def test_sources_have_their_weight_and_every_pass_each_sample_once() -> None:
    rule = {**RULE, "stages": [{"first": 0, "weights": [0.25, 0.75]}]}
    order = Order(rule)
    found = [order.at(index) for index in range(4096)]
    assert [source for source, _ in found].count(0) == 1024
    of_first = [sample for source, sample in found if source == 0]
    assert all(sorted(of_first[start : start + 5]) == [0, 1, 2, 3, 4] for start in range(0, 1020, 5))
