"""The tables of `python -m lockstep_trainer.health`: what drivers and libraries say is shown as it is."""

from __future__ import annotations

import sys

import pytest

from lockstep_trainer.health import __main__ as health
from lockstep_trainer.health.measured import Burn, Collective
from lockstep_trainer.health.preflight import Report, Tier
from lockstep_trainer.health.readings import GpuReadings, Readings

STRANGE = "no [bold]user[/] says [/INST] :smile:"


def test_others_text_is_no_markup(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    report = Report(
        tier=Tier.QUICK,
        node=STRANGE,
        readings=Readings(gpus=(GpuReadings(index=0, name=STRANGE, serial=STRANGE),)),
        findings=(),
        burns=(Burn(0, STRANGE),),
        collectives=(Collective("all_reduce", "0-1", 0, 0, "", "", 0.0, 0.0, 0.0, error=STRANGE),),
    )
    monkeypatch.setattr(health, "check", lambda *_, **__: report)
    monkeypatch.setattr(sys, "argv", ["health"])
    assert health.main() == 0
    assert capsys.readouterr().out.count(STRANGE) == 5
