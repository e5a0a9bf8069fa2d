"""``python -m lockstep_trainer.agent``: the supervisor starts it."""

from __future__ import annotations

import gc

gc.disable()  # until all is imported: collections would look through the same new modules again and again

# ruff: noqa: E402 (the reason stands above)
import asyncio
import logging
import os
import sys

from lockstep_trainer.agent.agent import Agent, listen
from lockstep_trainer.agent.settings import Job, Settings, SettingsError
from lockstep_trainer.supervisor import die_with_parent


def main() -> None:
    """Run the agent; ends with a sentence where its environment is wrong."""
    die_with_parent()
    level = os.environ.get("LOCKSTEP_LOG_LEVEL", "INFO").upper()
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    try:
        settings = Settings.from_env()
        job = Job.read(settings.config_dir / "job.json")
        listening = listen(settings)
    except SettingsError as error:
        sys.exit(f"agent: {error}")
    gc.freeze()  # what the imports made stays; later collections are short
    gc.enable()
    asyncio.run(_run(settings, job, listening))


async def _run(settings: Settings, job: Job, listening: object) -> None:
    await Agent(settings, job).run(listening)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
