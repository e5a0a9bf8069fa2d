"""Where this agent is and what job it serves: the pod's environment and its ``job.json``."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lockstep_api.constants import AGENT_PORT, METRICS_PORT, STORE_PORT
from lockstep_trainer.errors import TrainerError
from lockstep_trainer.protocol.jobplan import JobPlan
from lockstep_trainer.protocol.policy import Ladder, RetryRule
from lockstep_trainer.protocol.progress import HangBounds
from lockstep_trainer.protocol.slow import SlowRules


class SettingsError(TrainerError):
    """The pod's environment or its job.json is not what the agent needs."""


@dataclass(frozen=True, slots=True)
class Settings:
    """The environment, as ``docs/design/contracts.md`` lists it."""

    pod: str
    pod_uid: str
    namespace: str
    node: str
    host: str
    bind: str
    port: int
    metrics_port: int
    store_port: int
    run_dir: Path
    data_dir: Path
    config_dir: Path
    token_dir: Path
    tls: bool
    grace: float = 25.0  # seconds from SIGTERM to the end
    checked: bool = False  # this job's full preflight checks were passed on this node
    fault_injection: bool = False  # faults may be made on purpose
    termination_log: Path | None = None  # where the pod's last words go

    @property
    def address(self) -> str:
        """host:port that other agents reach this one at."""
        return f"{self.host}:{self.port}"

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ) -> Settings:
        """Raises SettingsError that names the variable."""

        def need(name: str) -> str:
            value = env.get(name)
            if not value:
                raise SettingsError(f"{name} is not set; the operator sets it on every pod of a job")
            return value

        def number(name: str, default: int) -> int:
            text = env.get(name) or str(default)
            if not text.isdigit():
                raise SettingsError(f"{name} is {text!r}; it must be a port number")
            return int(text)

        tls = env.get("LOCKSTEP_TLS") or "off"
        if tls not in ("on", "off"):
            raise SettingsError(f"LOCKSTEP_TLS is {tls!r}; it must be on or off")
        return cls(
            pod=need("LOCKSTEP_POD_NAME"),
            pod_uid=need("LOCKSTEP_POD_UID"),
            namespace=env.get("LOCKSTEP_NAMESPACE", "default"),
            node=env.get("LOCKSTEP_NODE_NAME", ""),
            host=need("LOCKSTEP_HOST"),
            bind=env.get("LOCKSTEP_BIND") or "0.0.0.0",
            port=number("LOCKSTEP_AGENT_PORT", AGENT_PORT),
            metrics_port=number("LOCKSTEP_METRICS_PORT", METRICS_PORT),
            store_port=number("LOCKSTEP_STORE_PORT", STORE_PORT),
            run_dir=Path(need("LOCKSTEP_RUN_DIR")),
            data_dir=Path(env.get("LOCKSTEP_DATA_DIR") or Path(need("LOCKSTEP_RUN_DIR"), "data")),
            config_dir=Path(need("LOCKSTEP_CONFIG_DIR")),
            grace=float(env.get("LOCKSTEP_GRACE_SECONDS") or 25),
            token_dir=Path(need("LOCKSTEP_TOKEN_DIR")),
            tls=tls == "on",
            checked=env.get("LOCKSTEP_NODE_NAME", "") in _words(env.get("LOCKSTEP_CHECKED_NODES", "")),
            fault_injection=env.get("LOCKSTEP_FAULT_INJECTION") == "on",
            termination_log=Path(env["LOCKSTEP_TERMINATION_LOG"]) if env.get("LOCKSTEP_TERMINATION_LOG") else None,
        )


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


@dataclass(frozen=True, slots=True)
class Job:
    """``job.json``: the job's names and its spec, as JSON with all defaults."""

    name: str
    namespace: str
    uid: str
    spec: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> Job:
        """Raises SettingsError that names the file and what is missing."""
        try:
            raw = json.loads(path.read_text())
            return cls(raw["name"], raw["namespace"], raw["uid"], raw["spec"])
        except OSError as error:
            raise SettingsError(f"{path} can't be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError) as error:
            raise SettingsError(f"{path} is no job: {type(error).__name__} {error}") from None

    @property
    def command(self) -> list[str] | None:
        """The user's own script, where there is one."""
        command: list[str] | None = self.spec.get("command")
        return command

    @property
    def preflight(self) -> str:
        """Off, Quick or Full."""
        return str(self.spec.get("resilience", {}).get("preflight", "Quick"))

    @property
    def searches_output(self) -> bool:
        """Whether a rule of resilience.retry has a pattern that workers' last lines are looked through for."""
        return any(rule.get("logPattern") for rule in self.spec.get("resilience", {}).get("retry", ()))

    @property
    def checkpoint_prefix(self) -> str:
        """Below checkpoint.uri."""
        return f"{self.namespace}/{self.name}/{self.uid}"

    def plan(self) -> JobPlan:
        """What the protocol needs of the spec."""
        spec = self.spec
        resilience = spec.get("resilience", {})
        hang = resilience.get("hang", {})
        trainer = spec.get("trainer")
        return JobPlan(
            job_uid=self.uid,
            nodes=spec["nodes"],
            gpus_per_node=spec["gpusPerNode"],
            spares=spec.get("spares", 0),
            steps=trainer["recipe"]["steps"] if trainer else None,
            reports_steps=trainer is not None,
            checkpoints=trainer is not None,
            checkpoint_every=_number(spec.get("checkpoint") or {}, "every"),
            memory_buddy=(spec.get("checkpoint") or {}).get("memory", {}).get("buddy", True),
            own_store=trainer is None,
            rejoin_grace=resilience.get("rejoinGraceSeconds", 5.0),
            ladder=Ladder(
                process_budget=resilience.get("budgets", {}).get("process", 10),
                in_process_budget=resilience.get("budgets", {}).get("inProcess", 20),
                rules=tuple(
                    RetryRule(
                        rule["action"],
                        frozenset(rule["exitCodes"]) if "exitCodes" in rule else None,
                        rule.get("logPattern"),
                    )
                    for rule in resilience.get("retry", ())
                ),
                script=trainer is None,
            ),
            rollback=resilience.get("corruption", {}).get("action") == "Rollback",
            slow=_slow_rules(spec) if trainer is not None else None,
            hang=HangBounds(
                factor=hang.get("factor", 5.0),
                minimum_seconds=hang.get("minimumSeconds", 60.0),
                first_step_seconds=hang.get("firstStepSeconds", 1800.0),
                meeting_seconds=hang.get("meetingSeconds", 300.0),
            ),
        )

    @property
    def leaderless_seconds(self) -> float:
        """How long workers of a node without a leader go on without a step."""
        return float(self.spec.get("resilience", {}).get("leaderDeadlineSeconds", 60.0))


def _slow_rules(spec: Mapping[str, Any]) -> SlowRules | None:
    stragglers = spec.get("resilience", {}).get("stragglers", {})
    if stragglers.get("action", "Report") == "Off":
        return None
    degrees = spec.get("parallelism", {})
    return SlowRules(
        stragglers.get("threshold", 0.1),
        tensor=degrees.get("tensor", 1),
        context=degrees.get("context", 1),
        pipeline=degrees.get("pipeline", 1),
    )


def _number(spec: Mapping[str, Any], name: str) -> int | None:
    """A field that is a number of steps, or ``auto``."""
    value = spec.get(name)
    return value if isinstance(value, int) else None
