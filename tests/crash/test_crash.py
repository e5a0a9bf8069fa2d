"""Short crash tests of each kind, a long one on demand, and the damages and draws themselves."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from crash import damage
from crash.campaign import campaign
from crash.deal import Dealer, Drawn
from crash.instants import APPEARS, PHASES, SECTIONS, Place
from crash.leg import durable_step, local_run
from crash.strikes import ALL, Striker
from s3server import S3Server


@pytest.mark.run
@pytest.mark.timeout(600)
def test_four_rounds(tmp_path: Path, server: S3Server) -> None:
    # Of this seed: a worker, the server, the member's agent, all pods.
    result, journal = campaign(tmp_path, server, rounds=4, seed=113, steps=400, say=print)
    assert result["rounds"] == 4
    assert result["damaged_checkpoints"] > 0
    assert result["fallbacks"] > 0
    assert len(journal.read_text().splitlines()) == 4 + result["jobs"]


@pytest.mark.run
@pytest.mark.slow
@pytest.mark.timeout(6 * 3600)
def test_hundreds_of_rounds(tmp_path: Path, server: S3Server) -> None:
    result, _ = campaign(tmp_path, server, rounds=300, seed=5, say=print)
    assert result["kills"] >= 300
    assert set(result["by_part"]) == {"worker", "leader's agent", "member's agent", "leader's pod", "member's pod",
                                      "S3 server", "all pods"}  # fmt: skip


@pytest.mark.run
@pytest.mark.timeout(300)
def test_a_damaged_latest_is_refused_with_a_sentence(tmp_path: Path, server: S3Server) -> None:
    with local_run(tmp_path / "job", server, 100_000) as run:
        run.until(lambda status: durable_step(status) > 0, 200, "a durable checkpoint")
        place = Place(run.state / "pods", run.run_store, server.bucket)
        latest = run.run_store / "latest"

        def harm() -> None:
            latest.write_bytes(latest.read_bytes()[:20])

        Striker(run, server, place, lambda: False).blackout(harm)
        result = run.finish(200)
    assert result.code == 1
    (sentence,) = result.errors.strip().splitlines()[-1:]
    assert "latest can't be read" in sentence
    assert result.status.restarts.total <= 2  # the blackout's own; what can't be mended is not tried again


# --- the parts -------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A step folder of made-up files."""
    dice = random.Random(1)
    for name in ("__0_0.distcp", "__1_0.distcp", ".metadata", "manifest.json", "ranges-r0.json", "samples-r0.jsonl"):
        (tmp_path / name).write_bytes(dice.randbytes(100))
    return tmp_path


@pytest.mark.parametrize("kind", damage.KINDS)
def test_a_damage_changes_something_and_never_the_sample_logs(kind: str, folder: Path) -> None:
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    said = damage.KINDS[kind](folder, random.Random(2))
    after = {file.name: file.read_bytes() for file in folder.iterdir()}
    changed = {name for name in before if after.get(name) != before[name]}
    assert changed
    assert all(name in said for name in changed)
    assert "samples-r0.jsonl" not in changed


def draws(seed: int, rounds: int) -> list[Drawn]:
    dealer = Dealer(random.Random(seed))
    return [dealer.draw(APPEARS, SECTIONS) for _ in range(rounds)]


def test_a_seed_names_its_rounds() -> None:
    assert draws(1, 50) == draws(1, 50)
    assert draws(1, 50) != draws(2, 50)


def test_all_parts_phases_and_damages_are_drawn() -> None:
    drawn = draws(3, 300)
    strikes = [strike for each in drawn for strike in each.strikes]
    assert len({strike.part for strike in strikes}) == 7
    assert {strike.aim.file.phase for strike in strikes if strike.aim.file} == set(PHASES)
    assert {strike.aim.section for strike in strikes if strike.aim.section} == {*SECTIONS, "restore"}
    assert {kind for each in drawn for kind in each.damages} == set(damage.KINDS)
    assert all(each.strikes[0].part == ALL for each in drawn if each.damages)
    assert any(len(each.strikes) == 2 for each in drawn)
