"""A campaign: rounds of kills and damage on one job after another, until there were as many as asked for.

Each job runs to its end, so that its last steps and its last checkpoint are struck as well.
"""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from crash.deal import Dealer
from crash.journal import Job, Journal, Round, summary
from crash.leg import STEPS, Leg, local_run, undisturbed
from crash.witness import Witness
from s3server import S3Server


def campaign(
    folder: Path,
    server: S3Server,
    *,
    rounds: int,
    seed: int,
    steps: int = STEPS,
    seconds: float = float("inf"),
    say: Callable[[str], None] = lambda line: None,
    keep: Callable[[dict[str, Any]], None] = lambda result: None,
) -> tuple[dict[str, Any], Path]:
    """(result, journal's path) of a campaign on a server. No job is begun after ``seconds``; ``keep`` gets the result
    so far at the end of each, so that a campaign that is broken off has not been for nothing.

    Raises AssertionError, with the run's last words, at the first thing that must not be.
    """
    journal = Journal(folder / "campaign.jsonl")
    dice = random.Random(seed)
    dealer = Dealer(dice)
    reference = undisturbed(folder / "reference", steps)
    say(f"reference: {len(reference)} steps")
    played, jobs = list[Round](), list[Job]()
    deadline = time.monotonic() + seconds
    while len(played) < rounds and time.monotonic() < deadline:
        number = len(jobs) + 1
        home = folder / f"job-{number}"
        with local_run(home, server, steps) as run, Witness(run.state) as witness:
            leg = Leg(number, run, server, witness, dice)
            if number == 1:
                say(f"aims: {', '.join([*leg.sections, *(file.name for file in leg.files)])}")
            while len(played) < rounds:
                one = leg.play(len(played) + 1, dealer.draw(leg.files, leg.sections))
                if one is None:
                    break  # the job is over
                played.append(one)
                journal.write(one)
                say(_line(one))
            jobs.append(leg.finish(reference))
        journal.write(jobs[-1])
        keep(summary(played, jobs, seed))
        say(f"job {number}: {jobs[-1].checked}; {jobs[-1].losses} losses as they should be")
        # A long campaign would fill the disk; what went wrong is kept, since it never comes here.
        shutil.rmtree(run.store)
        shutil.rmtree(home)
    return summary(played, jobs, seed), journal.path


def _line(one: Round) -> str:
    kills = " and ".join(f"{kill.part} at {kill.aim}{'' if kill.hit else ' (missed)'}" for kill in one.kills)
    restored = ", ".join(f"{each.source} step {each.step}" for each in one.restored) or "nothing lost"
    damaged = f"; {', '.join(one.damaged)}" if one.damaged else ""
    return f"{one.number:4} {kills}{damaged} → {restored}; {one.restarts} restarts, {one.seconds:.1f} s"
