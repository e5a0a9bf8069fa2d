"""A trace of a running worker holds the steps that were asked for, and whatever goes wrong with it, training goes on.

The last test goes the whole way: command, agent, worker, and back.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import signal
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from aiohttp import web

from forked import start_all, wait_all
from lockstep_api import constants
from lockstep_cli.__main__ import main
from lockstep_cli.commands.profile import parse_ranks
from lockstep_cli.errors import CliError
from lockstep_trainer.agent.profiles import Profiles, Request
from lockstep_trainer.agent.server import Server
from lockstep_trainer.agent.trust import Trust
from lockstep_trainer.profiling import Profiler
from lockstep_trainer.sections import Sections
from lockstep_trainer.steprecord import StepWriter
from lockstep_trainer.supervisor import write_json
from manifests import trainer_job

IDENTITY = "0123456789ab"
TOKEN = "a token"


class Worker:
    """A training loop that multiplies matrices. It runs in a forked process, as workers do: torch has one profiler."""

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self.folder = folder
        self.sections = Sections(StepWriter.create(folder / "steps"))
        self.profiler = Profiler(folder, rank, torch.device("cpu"), self.sections)
        self.done = 0

    def train(self, steps: int) -> None:
        weights = torch.ones(8, 8)
        for _ in range(steps):
            with self.sections("forward"):
                weights = weights @ weights / 8
            self.done += 1
            self.profiler.step(self.done)


def forked(folder: Path, body: Callable[[Worker], None], rank: int = 0) -> None:
    """Run ``body`` on a worker of its own process; an assertion in it fails the test."""
    assert wait_all(start_all([lambda: body(Worker(folder, rank))])) == [0]


def ask(folder: Path, identity: str = IDENTITY, **change: Any) -> None:
    """What the agent writes."""
    (folder / "profile" / identity).mkdir(parents=True)
    request = {"id": identity, "steps": 2, "trace": True, "memory": False, **change}
    write_json(folder / "profile" / "request.json", request)


def answer(folder: Path, identity: str = IDENTITY) -> dict[str, Any]:
    """What the worker answered."""
    status: dict[str, Any] = json.loads((folder / "profile" / identity / "status.json").read_text())
    return status


def test_a_trace_has_the_steps_that_were_asked_for(tmp_path: Path) -> None:
    def body(worker: Worker) -> None:
        worker.train(4)
        ask(tmp_path, steps=2)
        worker.train(6)
        worker.profiler.close()
        assert worker.done == 10

    forked(tmp_path, body, rank=3)
    status = answer(tmp_path)
    # Seen behind step 5; step 6 warms up.
    assert (status["state"], status["first_step"], status["last_step"]) == ("done", 7, 8)
    (file,) = status["files"]
    assert file["name"] == "trace-r3.json.gz"
    path = tmp_path / "profile" / IDENTITY / file["name"]
    assert file["bytes"] == path.stat().st_size
    names = [event.get("name") for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]]
    assert names.count("aten::mm") == 2
    assert names.count("forward") == 2  # the section, around it


def test_one_request_makes_one_trace_and_the_next_another(tmp_path: Path) -> None:
    other = "ba9876543210"

    def body(worker: Worker) -> None:
        ask(tmp_path, steps=1)
        worker.train(10)
        ask(tmp_path, other, steps=1)
        worker.train(5)
        worker.profiler.close()

    forked(tmp_path, body)
    assert answer(tmp_path)["first_step"] == 3
    assert answer(tmp_path, other)["first_step"] == 13


def test_a_memory_snapshot_without_a_gpu_is_refused_with_a_sentence(tmp_path: Path) -> None:
    ask(tmp_path, memory=True)
    forked(tmp_path, lambda worker: worker.train(3))
    status = answer(tmp_path)
    assert status["state"] == "failed"
    assert status["message"] == "a memory snapshot is of CUDA's allocator, and rank 0 runs on cpu; leave out --memory"


def test_what_goes_wrong_does_not_end_training(tmp_path: Path) -> None:
    def body(worker: Worker) -> None:
        (tmp_path / "profile").mkdir()
        (tmp_path / "profile" / "request.json").write_text("{")
        worker.train(3)
        ask(tmp_path, steps=1)
        worker.train(2)
        os.rename(tmp_path / "profile" / IDENTITY, tmp_path / "gone")  # the request was withdrawn
        worker.train(3)
        worker.profiler.close()
        assert worker.done == 8
        assert worker.sections.annotate is None

    forked(tmp_path, body)


def test_a_profile_that_training_does_not_live_to_see_says_so(tmp_path: Path) -> None:
    def body(worker: Worker) -> None:
        worker.train(3)
        worker.profiler.close()

    ask(tmp_path, steps=50)
    forked(tmp_path, body)
    assert answer(tmp_path)["state"] == "failed"
    assert "training ended" in answer(tmp_path)["message"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[", "not JSON"),
        ("3", "a request is"),
        ('{"step": 3}', "a request is"),
        ('{"steps": 0}', "from 1 to 100"),
        ('{"steps": true}', "from 1 to 100"),
        ('{"trace": false}', "one of them is true"),
    ],
)
def test_a_wrong_request_is_refused(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Request.parse(text)


def test_ranks_are_read_as_people_write_them() -> None:
    assert parse_ranks("3, 0-2,2") == [0, 1, 2, 3]
    for wrong in ("", "a", "3-", "3-1", "-1"):
        with pytest.raises(CliError, match="is no rank; write for example 0,3 or 0-7"):
            parse_ranks(wrong)


# ------------------------------------------------------------------------------------------- the whole way


@dataclass
class Known:
    """What the agent knows of a worker."""

    folder: Path
    rank: int
    ended: bool = False


@contextmanager
def training(*workers: Known) -> Iterator[None]:
    """The workers train, each in a process of its own."""

    def loop(known: Known) -> None:
        worker = Worker(known.folder, known.rank)
        while True:
            worker.train(1)
            time.sleep(0.002)  # a step takes its time

    for known in workers:
        known.folder.mkdir()
    pids = start_all([partial(loop, known) for known in workers])
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        wait_all(pids)


@contextmanager
def serving(run: Path, workers: dict[int, Known]) -> Iterator[None]:
    """An agent's server with these workers, and the folder of a local run that names it."""
    (run / "token").mkdir()
    (run / "token" / "token").write_text(TOKEN)
    agent = SimpleNamespace(
        trust=Trust(run / "token", "uid", use_tls=False),
        job=SimpleNamespace(command=None, spec={"gpusPerNode": 1}),
        settings=SimpleNamespace(bind=""),
        workers=SimpleNamespace(current=workers.get),
        snapshots=None,  # nobody asks for copies here
        ranks=lambda: ", ".join(map(str, workers)),
    )
    server = Server(agent)  # type: ignore[arg-type]
    inventory = web.get("/v1/inventory", _inventory)
    app = web.Application(middlewares=list(server.app.middlewares))
    app.add_routes([inventory, *Profiles(agent).routes()])  # type: ignore[arg-type]
    ready, loop = threading.Event(), asyncio.new_event_loop()

    async def start() -> web.AppRunner:
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        (run / "pods").mkdir(parents=True)
        address = f"127.0.0.1:{runner.addresses[0][1]}"
        (run / "pods" / "job-0-1.json").write_text(json.dumps({"address": address}))
        return runner

    def serve() -> None:
        runner = loop.run_until_complete(start())
        loop.call_soon(ready.set)
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())

    thread = threading.Thread(target=serve)
    thread.start()
    assert ready.wait(20)
    try:
        yield
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _inventory(_: web.Request) -> web.Response:
    return web.json_response({"slot": 0})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a local run with two ranks."""
    job = trainer_job()
    job["spec"] |= {"nodes": 1, "gpusPerNode": 2}
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "status.json").write_text(json.dumps({**job, "status": {"phase": "Running"}}))
    return folder


def test_the_command_brings_traces_of_the_ranks_that_it_names(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workers = {rank: Known(tmp_path / f"w{rank}", rank) for rank in (0, 1)}
    target = tmp_path / "traces"
    with training(*workers.values()), serving(run, workers):  # a process with threads must not fork
        code = main(["profile", str(run), "--ranks", "0-1", "--steps", "2", "--output-dir", str(target)])
        said = capsys.readouterr()
        assert code == 0, said.err
    assert sorted(path.name for path in target.iterdir()) == ["trace-r0.json.gz", "trace-r1.json.gz"]
    for path in target.iterdir():
        assert b"aten::mm" in gzip.decompress(path.read_bytes())
    assert "downloading trace-r1.json.gz" in said.out
    assert "ui.perfetto.dev" in said.out
    for worker in workers.values():  # nothing stays in the pods' memory
        assert list((worker.folder / "profile").iterdir()) == []


def test_the_command_says_why_there_is_no_trace(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    worker = Known(tmp_path / "w0", 0)
    with training(worker), serving(run, {0: worker}):
        assert main(["profile", str(run), "--memory"]) == 1
        assert "rank 0: a memory snapshot is of CUDA's allocator" in capsys.readouterr().err
        assert main(["profile", str(run), "--ranks", "1"]) == 1
        assert "rank 1 is not here: this node holds ranks 0" in capsys.readouterr().err
        assert main(["profile", str(run), "--ranks", "2"]) == 1
        assert "has the ranks 0 to 1" in capsys.readouterr().err
        assert main(["profile", str(run), "--steps", "0"]) == 1
        assert "rank 0: steps is 0; it must be a number from 1 to 100" in capsys.readouterr().err
        (run / "token" / "token").write_text("another")
        assert main(["profile", str(run)]) == 1
        assert "rank 0 has no pod now" in capsys.readouterr().err
    job = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps({**job, "status": {"phase": "Succeeded"}}))
    assert main(["profile", str(run)]) == 1
    assert "has ended (Succeeded)" in capsys.readouterr().err


def test_the_proxys_header_is_as_good_as_the_other(run: Path) -> None:
    """A call through the API server's proxy cannot carry Authorization."""
    with serving(run, {}):
        address = json.loads((run / "pods" / "job-0-1.json").read_text())["address"]

        def status(headers: dict[str, str]) -> int:
            request = urllib.request.Request(f"http://{address}/v1/inventory", headers=headers)
            try:
                with urllib.request.urlopen(request, timeout=5) as answer:
                    code: int = answer.status
                    return code
            except urllib.error.HTTPError as error:
                return error.code

        assert status({constants.TOKEN_HEADER: TOKEN}) == 200
        assert status({"Authorization": f"Bearer {TOKEN}"}) == 200
        assert status({constants.TOKEN_HEADER: "wrong", "Authorization": f"Bearer {TOKEN}"}) == 401
        assert status({}) == 401
