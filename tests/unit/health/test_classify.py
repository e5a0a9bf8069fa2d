"""What is read off a GPU becomes a finding, as bad as the table says; a healthy one has none."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpu.recordings import edited, healthy
from lockstep_trainer.errors import UserError
from lockstep_trainer.health.classify import classify
from lockstep_trainer.health.nvml import read_gpus
from lockstep_trainer.health.readings import HostReadings, Readings, Xid
from lockstep_trainer.health.recorded import RecordedNvml
from lockstep_trainer.health.table import Severity, load

TABLE = load()


def found(*gpus: dict[str, object], xids: tuple[Xid, ...] = ()) -> dict[str, Severity]:
    """Kind → severity."""
    readings = Readings(gpus=read_gpus(RecordedNvml(gpus)), xids=xids)
    return {finding.kind: finding.severity for finding in classify(readings, TABLE)}


def test_a_healthy_gpu_has_no_finding() -> None:
    assert found(healthy()) == {}
    assert found(edited("healthy, with NVLinks")) == {}


@pytest.mark.parametrize(
    ("edit", "kinds"),
    [
        ("ecc error", {"gpu.ecc-uncorrected", "gpu.remap-pending"}),
        ("throttled", {"gpu.throttled-by-heat"}),
        ("row remap pending", {"gpu.remap-pending"}),
        ("nvlink down", {"gpu.nvlink-down"}),
        ("fallen off the bus", {"gpu.lost"}),
    ],
)
def test_a_fault_is_found_and_fatal(edit: str, kinds: set[str]) -> None:
    assert found(edited(edit)) == dict.fromkeys(kinds, Severity.FATAL)


def test_a_finding_names_the_gpu_and_the_remedy_and_not_its_neighbours() -> None:
    gpus = (edited("healthy, with NVLinks", 0), edited("nvlink down", 1), edited("healthy, with NVLinks", 2))
    (finding,) = classify(Readings(gpus=read_gpus(RecordedNvml(gpus))), TABLE)
    assert (finding.gpu, finding.serial) == (1, "0000000000001")
    assert "1 of its 18 NVLinks are down" in str(finding)
    assert "GPU-00000001-0000-0000-0000-000000000000" in str(finding)
    assert TABLE.gpu["nvlink-down"].remedy in str(finding)


def test_a_driver_without_a_reading_is_no_fault() -> None:
    """What consumer GPUs, old drivers and containers without rights refuse."""
    mute: dict[str, object] = {"UUID": "GPU-1", "Serial": {"error": "NVMLError_NoPermission"}}
    assert found(mute) == {}


def test_an_unexpected_error_of_one_question_is_said() -> None:
    assert found({**healthy(), "Temperature": {"error": "NVMLError_Unknown"}}) == {"gpu.unanswered": Severity.WARN}


@pytest.mark.parametrize(
    ("code", "severity"), [(79, Severity.FATAL), (94, Severity.WARN), (13, None), (63, Severity.WARN), (9999, "warn")]
)
def test_an_error_of_the_driver_is_as_bad_as_the_table_says(code: int, severity: Severity | None) -> None:
    expected = {} if severity is None else {f"xids.{code}": severity}
    assert found(healthy(), xids=(Xid(0, code),)) == expected
    assert found(healthy(), xids=(Xid(None, code),)) == expected


def test_xids_are_heard_once_each() -> None:
    nvml = RecordedNvml((healthy(), {**edited("xid 95", 1), "Xids": [95, 95]}))
    with nvml.listen() as events:
        findings = classify(Readings(gpus=read_gpus(nvml), xids=tuple(events.heard())), TABLE)
    assert [(finding.kind, finding.gpu) for finding in findings] == [("xids.95", 1)]


def test_the_worst_comes_first() -> None:
    host = HostReadings(shm_total=1, gpus_missing=1)
    severities = [finding.severity for finding in classify(Readings(host=host), TABLE)]
    assert severities == [Severity.FATAL, Severity.WARN]


def test_an_administrator_changes_a_field_of_a_row(tmp_path: Path) -> None:
    path = tmp_path / "findings.yaml"
    path.write_text("gpu: {nvlink-down: {severity: warn}}\nxids: {'63': {severity: fatal}}\n")
    table = load(path)
    assert table.gpu["nvlink-down"].severity == Severity.WARN
    assert table.gpu["nvlink-down"].remedy == TABLE.gpu["nvlink-down"].remedy
    assert table.xid(63).severity == Severity.FATAL
    assert table.xid(64) == TABLE.xid(64)


def test_an_administrator_moves_a_bound_and_adds_rows(tmp_path: Path) -> None:
    path = tmp_path / "findings.yaml"
    path.write_text(
        "host:\n  shm-small: {less_than: shm_free}\n"
        "xids:\n  999: {name: new, severity: fatal, remedy: none, source: us}\n"
        "rates:\n  - {match: H100, matmul: 1, copy: 2, source: ours}\n"
    )
    table = load(path)
    assert (table.host["shm-small"].below, table.host["shm-small"].less_than) == (None, "shm_free")
    assert table.xid(999).severity == Severity.FATAL
    rates = table.rates_of("NVIDIA H100 80GB HBM3")
    assert rates is not None
    assert rates.expected("copy") == 2


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("gpu: {nvlink-down: {severity: bad}}", "gpu.nvlink-down.severity"),
        ("gpu: {new: {severity: fatal}}", "gpu.new"),
        ("gpu: {nvlink-down: {reading: nothing}}", "gpu.nvlink-down"),
        ("gpu: {nvlink-down: {above: 0, below: 1}}", "gpu.nvlink-down"),
        ("gpu: {nvlink-down: {says: '{nonsense}'}}", "gpu.nvlink-down"),
        ("xids: {seventy: {severity: fatal}}", "xids.seventy"),
        ("nodes: {}", "nodes"),
        ("- gpu", "must be an object"),
    ],
)
def test_a_row_that_is_wrong_is_refused_by_its_name(tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "findings.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as refused:
        load(path)
    assert str(path) in str(refused.value)
    assert named in str(refused.value)


def test_rates_of_a_variant_come_before_those_of_its_family() -> None:
    pcie, sxm = TABLE.rates_of("NVIDIA H100 PCIe"), TABLE.rates_of("NVIDIA H100 80GB HBM3")
    assert pcie is not None
    assert sxm is not None
    assert pcie.matmul < sxm.matmul
    assert TABLE.rates_of("cpu") is None
