"""``python -m lockstep_trainer.agent``: the supervisor starts it."""

from __future__ import annotations

import gc
import os

from lockstep_trainer.supervisor import (
    AGENT_NAME,
    STANDBY_NAME,
    STANDBY_VARIABLE,
    SUPERVISOR_VARIABLE,
    die_with_parent,
    name_process,
)

gc.disable()  # until all is imported: collections would look through the same new modules again and again
if STANDBY_VARIABLE in os.environ:
    name_process(STANDBY_NAME)

# ruff: noqa: E402 (the reason stands above)
import asyncio
import logging
import socket
import sys

from lockstep_api.constants import PREFLIGHT_EXIT_CODE
from lockstep_trainer.agent.agent import Agent, listen
from lockstep_trainer.agent.containerlog import STDERR, Records
from lockstep_trainer.agent.preflight import Unfit, preflight
from lockstep_trainer.agent.settings import Job, Settings, SettingsError
from lockstep_trainer.agent.trust import Trust

_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def main() -> None:
    """Run the agent; ends with a sentence where its environment is wrong."""
    die_with_parent(parent=os.environ.get(SUPERVISOR_VARIABLE))
    gc.freeze()  # what the imports made stays; later collections are short
    gc.enable()
    _stand_by()
    name_process(AGENT_NAME)
    level = os.environ.get("LOCKSTEP_LOG_LEVEL", "INFO").upper()
    logging.basicConfig(level=level, format=_FORMAT, stream=sys.stderr)
    try:
        settings = Settings.from_env()
        job = Job.read(settings.config_dir / "job.json")
        trust = Trust(settings.token_dir, job.uid, use_tls=settings.tls)
        preflight(settings, job)
        sockets = listen(settings)
    except SettingsError as error:
        sys.exit(f"agent: {error}")
    except Unfit as unfit:
        print(f"agent: this node failed the preflight checks: {unfit}", file=sys.stderr)
        sys.exit(PREFLIGHT_EXIT_CODE)
    asyncio.run(_run(settings, job, trust, sockets))


def _stand_by() -> None:
    """Wait until the agent before this one has ended; the supervisor's end ends this process too."""
    descriptor = os.environ.pop(STANDBY_VARIABLE, None)
    if descriptor is None:
        return
    if not os.read(int(descriptor), 1):
        sys.exit(0)
    os.close(int(descriptor))


async def _run(settings: Settings, job: Job, trust: Trust, sockets: tuple[socket.socket, socket.socket]) -> None:
    # From here on others wait for this loop, which must not wait for whoever reads the log.
    logging.basicConfig(format=_FORMAT, handlers=[Records(STDERR)], force=True)
    try:
        await Agent(settings, job, trust).run(*sockets)
    finally:
        STDERR.settle()


if __name__ == "__main__":
    main()
