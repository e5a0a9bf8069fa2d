"""What a worker is told when it starts: ``start.json`` for Lockstep's own trainer, variables for a user's script."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from lockstep_api.messages import Start
from lockstep_trainer.agent.settings import Settings
from lockstep_trainer.injection import faultorders


def worker_orders(settings: Settings, start: Start, *, rank: int, local_rank: int, slot: int) -> dict[str, Any]:
    """The fields of ``lockstep_trainer.config.Orders``."""
    restore = start.restore
    return {
        "job": str(settings.config_dir / "job.json"),
        "job_uid": start.job_uid,
        "epoch": start.term.epoch,
        "generation": start.term.generation,
        "rank": rank,
        "local_rank": local_rank,
        "node_rank": slot,
        "world_size": start.nodes * start.gpus_per_node,
        "local_world_size": start.gpus_per_node,
        "rendezvous": {
            "host": start.rendezvous.host,
            "port": start.rendezvous.port,
            "prefix": start.rendezvous.prefix,
        },
        "restore": restore and asdict(restore),
        "memory": start.memory and {"state": asdict(start.memory.state)},
        "doubt": start.doubt and asdict(start.doubt),
        "data_dir": str(settings.data_dir),
        "stays": True,
        "faults": str(settings.run_dir / faultorders.FOLDER / str(local_rank)) if settings.fault_injection else None,
    }


def script_environment(start: Start, rank: int, local_rank: int, slot: int) -> dict[str, str]:
    """What torchrun would set for a user's script."""
    host, port = start.rendezvous.host, str(start.rendezvous.port)
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(start.nodes * start.gpus_per_node),
        "LOCAL_WORLD_SIZE": str(start.gpus_per_node),
        "GROUP_RANK": str(slot),
        "NODE_RANK": str(slot),
        "MASTER_ADDR": host,
        "MASTER_PORT": port,
        "TORCHELASTIC_RESTART_COUNT": str(start.term.generation - 1),
        "TORCHELASTIC_RUN_ID": f"{start.job_uid}/{start.rendezvous.prefix}",
        "PET_NNODES": str(start.nodes),
        "PET_NPROC_PER_NODE": str(start.gpus_per_node),
        "PET_NODE_RANK": str(slot),
        "PET_MASTER_ADDR": host,
        "PET_MASTER_PORT": port,
        "PYTHONUNBUFFERED": "1",
    }
