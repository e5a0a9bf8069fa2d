"""The checks of this pod's node before the agent offers itself to anybody: no inventory, no slot.

They run once for each start of the container, in a process of their own (``lockstep_trainer.health``): an agent that
is started again has workers that train, and a GPU in a bad state may hold whoever asks it. The quick ones run once more
when a worker ends by an error that may be its GPU's.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import subprocess
import sys
from typing import Any

from lockstep_api.constants import FINDINGS_FILE
from lockstep_trainer.agent.settings import Job, Settings
from lockstep_trainer.errors import TrainerError
from lockstep_trainer.supervisor import read_json, write_json

log = logging.getLogger(__name__)

SECONDS = {"Quick": 120.0, "Full": 900.0}
"""Far more than the checks take on a machine without a free core. What takes longer is held by the driver."""
_FATAL = 1
_MESSAGE_BYTES = 4000
"""A kubelet keeps 4096 bytes of a termination message."""


class Unfit(TrainerError):
    """The node must not get work; says what was found."""


def preflight(settings: Settings, job: Job) -> None:
    """Raises Unfit, once what was found is where the operator will find it. What can't be checked is no fault of the
    node: that is logged."""
    path, starts = settings.run_dir / "preflight.json", _container_starts(settings)
    before = read_json(path) or {}
    if job.preflight == "Off" or before.get("container_starts") == starts:
        return
    # What takes a minute is done once on each node: a container that is started again has not moved.
    tier = "Quick" if before.get("full") or settings.checked else job.preflight
    report = check(settings, job, tier)
    settings.run_dir.mkdir(parents=True, exist_ok=True)
    full = bool(before.get("full")) or (tier == "Full" and report is not None)
    write_json(path, {"container_starts": starts, "full": full, "report": report})


def devices(settings: Settings) -> tuple[str, ...]:
    """The GPUs that the checks have seen, in order, each by serial number and UUID; none where there are none, or no
    checks were made."""
    report = (read_json(settings.run_dir / "preflight.json") or {}).get("report") or {}
    gpus = report.get("readings", {}).get("gpus", ())
    known = [(f"serial {gpu['serial']}" if gpu.get("serial") else "", gpu.get("uuid", "")) for gpu in gpus]
    return tuple(", ".join(filter(None, names)) for names in known)


def check(settings: Settings, job: Job, tier: str) -> dict[str, Any] | None:
    """The report, None where there is none; raises Unfit, once its text is in the termination log."""
    try:
        return _check(settings, job, tier)
    except Unfit as unfit:
        if settings.termination_log:
            settings.termination_log.write_text(str(unfit).encode()[:_MESSAGE_BYTES].decode(errors="ignore"))
        raise


async def look_again(settings: Settings, job: Job) -> None:
    """The quick checks of a node whose worker has met an error that may be its GPU's; raises Unfit."""
    if job.preflight != "Off":
        await asyncio.to_thread(check, settings, job, "Quick")


def _check(settings: Settings, job: Job, tier: str) -> dict[str, Any] | None:
    command = [sys.executable, "-m", "lockstep_trainer.health", "--json", "--tier", tier]
    command += ["--run-dir", str(settings.run_dir)]
    if "KUBERNETES_SERVICE_HOST" in os.environ:  # a local run has as many GPUs as its machine, or none
        command += ["--gpus", str(job.spec["gpusPerNode"])]
    findings = settings.config_dir / FINDINGS_FILE
    if findings.exists():
        report = _run([*command, "--findings", str(findings)], SECONDS[tier])
        if report:
            return report
        log.error("the administrator's %s can't be used, or nothing can; trying without", FINDINGS_FILE)
    return _run(command, SECONDS[tier])


def _run(command: list[str], seconds: float) -> dict[str, Any] | None:
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()  # and no waiting: what the driver holds can't be killed
        raise Unfit(f"the checks did not end within {seconds:.0f} s: its GPUs or their driver do not answer") from None
    try:
        report: dict[str, Any] = json.loads(output)
        found = [(one["severity"], one["text"]) for one in report["findings"]]
    except (ValueError, KeyError):
        log.error("the preflight checks could not be made (exit code %s)", process.returncode)
        return None
    for severity, text in found:
        log.warning("preflight: %s: %s", severity, text)
    if process.returncode == _FATAL:
        raise Unfit("; ".join(text for severity, text in found if severity == "fatal"))
    return report


def _container_starts(settings: Settings) -> int:
    """How often the container was started; the supervisor counts."""
    try:
        return int((settings.run_dir / "container-starts").read_text())
    except (FileNotFoundError, ValueError):
        return 0
