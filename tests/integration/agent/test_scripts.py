"""A user's script on real supervisors, agents, zygotes: it goes on through the death of any of them.

The script needs no torch, so these tests are about the agents alone and take seconds.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession

from integration.agent.harness import TOKEN, Cluster, Pod, gone, kill, until
from lockstep_api.messages import Progress

pytestmark = [pytest.mark.run, pytest.mark.timeout(120)]
SCRIPT = Path(__file__).with_name("ring.py")
ROUNDS = 20


def spec(folder: Path, nodes: int = 2, gpus: int = 2, **resilience: Any) -> dict[str, Any]:
    command = [sys.executable, str(SCRIPT), str(folder), str(ROUNDS)]
    return {"nodes": nodes, "gpusPerNode": gpus, "command": command, "resilience": resilience}


def held(folder: Path) -> Path:
    """A folder whose workers stop in the first round, until ``release``."""
    folder.mkdir()
    (folder / "hold").touch()
    return folder


def release(folder: Path) -> None:
    (folder / "hold").unlink()


def processes(pod: Pod) -> tuple[int, int]:
    return pod.process.pid, pod.agent_pid()


def test_runs_to_its_end(tmp_path: Path) -> None:
    """All ranks get torchrun's environment, meet, and the job succeeds when all have exited with 0."""

    async def scenario() -> None:
        out = tmp_path / "out"
        out.mkdir()
        async with Cluster.up(tmp_path / "pods", spec(out)) as cluster:
            finished = await cluster.finished()
            assert finished.outcome == "succeeded"
            assert [(out / f"rank-{rank}").read_text() for rank in range(4)] == [f"0 {ROUNDS}"] * 4
            assert "[step 0 rank 3] rank 3 of 4 done" in cluster.pods[1].log

    asyncio.run(scenario())


def test_worker_is_killed(tmp_path: Path) -> None:
    """A dead worker costs one generation; supervisors and agents stay, and the fault names rank, signal and output."""

    async def scenario() -> None:
        out = held(tmp_path / "out")
        async with Cluster.up(tmp_path / "pods", spec(out)) as cluster:
            await cluster.running(1)
            before = [processes(pod) for pod in cluster.pods]
            kill(cluster.pods[1].worker_pid(3, generation=1))
            await cluster.running(2)
            release(out)
            assert (await cluster.finished()).outcome == "succeeded"
            assert [processes(pod) for pod in cluster.pods] == before
            (fault,) = cluster.faults()
            assert (fault.cause, fault.rank, fault.exit_code, fault.witness) == ("WorkerExited", 3, -9, "exit")
            assert fault.detect_seconds < 1.0
            (recovered,) = cluster.recoveries()
            assert sum(recovered.seconds.values()) < 10.0

    asyncio.run(scenario())


@pytest.mark.parametrize("slot", [0, 1])
def test_agent_is_killed(tmp_path: Path, slot: int) -> None:
    """Workers outlive the agent, the leader's too: no generation is lost, and the new agent sees them to their end."""

    async def scenario() -> None:
        out = held(tmp_path / "out")
        async with Cluster.up(tmp_path / "pods", spec(out)) as cluster:
            await cluster.running(1)
            workers = [cluster.pods[slot].worker_pid(slot * 2 + local, 1) for local in range(2)]
            agent = cluster.pods[slot].agent_pid()
            heard = len(cluster.heard)
            kill(agent)
            await gone(agent)
            await cluster.wait_for(
                lambda m: isinstance(m, Progress) and m.connected == 2 and m.state == "running", since=heard
            )
            assert [cluster.pods[slot].worker_pid(slot * 2 + local, 1) for local in range(2)] == workers
            assert cluster.pods[slot].agent_pid() != agent
            release(out)
            assert (await cluster.finished()).outcome == "succeeded"
            assert cluster.faults() == []

    asyncio.run(scenario())


def test_the_agent_that_stands_by_takes_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its imports are done: nothing but its start lies between the end of one agent and the next. A standby that dies
    is replaced too."""
    monkeypatch.setenv("LOCKSTEP_STANDBY_SECONDS", "0.01")

    async def scenario() -> None:
        out = held(tmp_path / "out")
        async with Cluster.up(tmp_path / "pods", spec(out)) as cluster:
            await cluster.running(1)
            pod = cluster.pods[0]
            workers = [pod.worker_pid(local, 1) for local in range(2)]
            first = await until(pod.standby_pid)
            kill(first)
            await gone(first)
            second = await until(pod.standby_pid)
            agent = pod.agent_pid()
            heard = len(cluster.heard)
            kill(agent)
            await gone(agent)
            await cluster.wait_for(
                lambda m: isinstance(m, Progress) and m.connected == 2 and m.state == "running", since=heard
            )
            assert pod.agent_pid() == second
            assert [pod.worker_pid(local, 1) for local in range(2)] == workers
            assert await until(pod.standby_pid) not in (first, second)
            release(out)
            assert (await cluster.finished()).outcome == "succeeded"
            assert cluster.faults() == []

    asyncio.run(scenario())


def test_worker_dies_while_its_agent_is_away(tmp_path: Path) -> None:
    """A new agent learns of an end that nobody watched, with its exit code."""

    async def scenario() -> None:
        out = held(tmp_path / "out")
        async with Cluster.up(tmp_path / "pods", spec(out)) as cluster:
            await cluster.running(1)
            worker = cluster.pods[1].worker_pid(2, 1)
            kill(cluster.pods[1].agent_pid())
            kill(worker)
            await cluster.running(2)
            release(out)
            assert (await cluster.finished()).outcome == "succeeded"
            (fault,) = cluster.faults()
            assert (fault.rank, fault.exit_code) == (2, -9)

    asyncio.run(scenario())


def test_zygote_is_killed(tmp_path: Path) -> None:
    """Its workers go on as the supervisor's children, and a new zygote starts the next ones."""

    async def scenario() -> None:
        out = held(tmp_path / "out")
        async with Cluster.up(tmp_path / "pods", spec(out)) as cluster:
            await cluster.running(1)
            pod = cluster.pods[1]
            zygote, worker = pod.zygote_pid(), pod.worker_pid(3, 1)
            kill(zygote)
            await gone(zygote)
            await cluster.until_warm(pod, False)
            assert Path(f"/proc/{worker}").exists(), "the worker must outlive the zygote"
            kill(worker)
            await cluster.running(2)
            await cluster.until_warm(pod, True)
            assert pod.zygote_pid() != zygote
            release(out)
            assert (await cluster.finished()).outcome == "succeeded"
            (fault,) = cluster.faults()
            assert (fault.rank, fault.exit_code) == (3, -9), "the supervisor keeps the exit code of an orphan"

    asyncio.run(scenario())


def test_pod_is_lost(tmp_path: Path) -> None:
    """A supervisor that dies takes its pod with it; the leader asks for another, and the survivor waits in place."""

    async def scenario() -> None:
        out = held(tmp_path / "out")
        async with Cluster.up(tmp_path / "pods", spec(out, rejoinGraceSeconds=1.0)) as cluster:
            await cluster.running(1)
            lost, survivor = cluster.pods[1], processes(cluster.pods[0])
            workers = [lost.worker_pid(rank, 1) for rank in (2, 3)]
            lost.process.kill()
            for pid in workers:
                await gone(pid)
            await cluster.running(1, epoch=2)
            release(out)
            assert (await cluster.finished()).outcome == "succeeded"
            assert processes(cluster.pods[0]) == survivor
            assert cluster.pods[1].name != lost.name

    asyncio.run(scenario())


def test_fatal_exit_code(tmp_path: Path) -> None:
    """An exit code that the user declared fatal ends the job at once, with a sentence."""

    async def scenario() -> None:
        job = spec(tmp_path, retry=[{"exitCodes": [3], "action": "Fail"}])
        job["command"] = [sys.executable, "-c", "import os, sys; sys.exit(3 if os.environ['RANK'] == '2' else 0)"]
        async with Cluster.up(tmp_path / "pods", job) as cluster:
            finished = await cluster.finished()
            assert (finished.outcome, finished.reason) == ("failed", "FatalExitCode")
            assert "rank 2 ended by exit code 3" in finished.message

    asyncio.run(scenario())


def test_command_that_does_not_exist(tmp_path: Path) -> None:
    """The worker's output says which program was not found; the budget bounds how often that is tried."""

    async def scenario() -> None:
        job = spec(tmp_path, nodes=1, gpus=1, budgets={"process": 1})
        job["command"] = ["no-such-program"]
        async with Cluster.up(tmp_path / "pods", job) as cluster:
            fault = await cluster.wait_for(lambda m: m.kind == "FaultReport")
            assert any("cannot run 'no-such-program'" in line for line in cluster.faults()[0].log_tail), fault

    asyncio.run(scenario())


def test_port_is_guarded(tmp_path: Path) -> None:
    """Every call but health and metrics needs the job's token; logs of a worker can be asked for."""

    async def scenario() -> None:
        out = held(tmp_path / "out")
        async with Cluster.up(tmp_path / "pods", spec(out)) as cluster, ClientSession() as session:
            await cluster.running(1)
            base = f"http://{cluster.pods[1].address}"
            for path, status in (("/healthz", 200), ("/metrics", 200), ("/v1/inventory", 401), ("/v1/operator", 401)):
                async with session.get(base + path) as response:
                    assert response.status == status, path
            token = {"Authorization": f"Bearer {TOKEN}"}
            async with session.get(f"{base}/v1/workers/2/log?tail=1", headers=token) as response:
                assert await response.text() == "round 1\n"
            async with session.get(f"{base}/v1/workers/9/log", headers=token) as response:
                assert response.status == 404
                assert "this node holds ranks 2, 3" in await response.text()
            async with session.get(f"http://{cluster.pods[0].address}/metrics") as response:
                text = await response.text()
                assert 'lockstep_members_connected{job_name="job",namespace="default"} 2.0' in text

    asyncio.run(scenario())


def test_sigterm_leaves_nothing(tmp_path: Path) -> None:
    """Ending a pod ends its workers, zygote and agent, within the grace period."""

    async def scenario() -> None:
        out = held(tmp_path / "out")
        async with Cluster.up(tmp_path / "pods", spec(out)) as cluster:
            await cluster.running(1)
            pod = cluster.pods[1]
            pids = [pod.agent_pid(), pod.zygote_pid(), pod.worker_pid(2, 1), pod.worker_pid(3, 1)]
            pod.process.terminate()
            async with asyncio.timeout(10):
                assert await pod.process.wait() == 0
            assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]

    asyncio.run(scenario())
