"""The table of findings: ``findings.yaml``, and what an administrator's file changes in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lockstep_trainer.errors import UserError
from lockstep_trainer.health.readings import GpuReadings, HostReadings

DEFAULTS = Path(__file__).with_name("findings.yaml")
_READINGS = {
    "gpu": {field.name for field in dataclasses.fields(GpuReadings)},
    "host": {field.name for field in dataclasses.fields(HostReadings)},
}


class Severity(StrEnum):
    """How bad a finding is."""

    FATAL = "fatal"
    """The node gets no work."""
    WARN = "warn"
    """It is said, and nothing is done."""
    IGNORE = "ignore"
    """It is not even said."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Row(_Part):
    """What every row has."""

    severity: Severity
    remedy: str = Field(min_length=1)
    source: str = Field(min_length=1)
    reason: str = ""
    """Why it stands here as it does, where sources conflict."""


class XidRow(Row):
    """An error of the driver."""

    name: str


class SaidRow(Row):
    """A finding whose bound is in the code or among the rates."""

    says: str
    below: float | None = Field(default=None, gt=0, le=1)


class ReadingRow(Row):
    """A bound on one reading; exactly one of set, above, below, bits, less_than, above_share."""

    reading: str
    says: str
    set: bool | None = None
    above: float | None = None
    below: float | None = None
    bits: int | None = None
    less_than: str | None = None
    """Name of another reading."""
    above_share: float | None = None
    of: str | None = None
    """Name of the reading that above_share is of."""

    @model_validator(mode="after")
    def _one_bound(self) -> Self:
        bounds = (self.set, self.above, self.below, self.bits, self.less_than, self.above_share)
        if sum(bound is not None for bound in bounds) != 1:
            raise ValueError("needs exactly one of set, above, below, bits, less_than and above_share")
        if (self.above_share is None) != (self.of is None):
            raise ValueError("above_share needs of, the reading that it is a share of, and of needs above_share")
        return self


class Rates(_Part):
    """What a GPU should reach: TFLOP/s and GB/s."""

    match: str
    matmul: float = Field(gt=0)
    copy_: float = Field(gt=0, alias="copy")
    h2d: float | None = Field(default=None, gt=0)
    d2h: float | None = Field(default=None, gt=0)
    allreduce: float | None = Field(default=None, gt=0)
    source: str

    def expected(self, measure: str) -> float | None:
        """Of matmul, copy, h2d, d2h or allreduce."""
        value: float | None = getattr(self, "copy_" if measure == "copy" else measure)
        return value


class Floor(_Part):
    """The share of the expected rate below which it is too slow."""

    share: float = Field(gt=0, le=1)
    source: str


class Table(_Part):
    """All rows."""

    gpu: dict[str, ReadingRow]
    host: dict[str, ReadingRow]
    xids: dict[int | str, XidRow]
    burnin: dict[str, SaidRow]
    collectives: dict[str, SaidRow]
    rates: list[Rates]
    floors: dict[str, Floor]

    @model_validator(mode="after")
    def _names_exist(self) -> Self:
        if "other" not in self.xids or any(isinstance(key, str) and key != "other" for key in self.xids):
            raise ValueError("xids: rows are named by their number, and `other` stands for all that have none")
        for part, rows in (("gpu", self.gpu), ("host", self.host)):
            for name, row in rows.items():
                used = {row.reading, row.less_than or row.reading, row.of or row.reading}
                if unknown := used - _READINGS[part]:
                    raise ValueError(f"{part}.{name}: there is no reading {', '.join(sorted(unknown))}")
                try:
                    row.says.format(**dict.fromkeys(_READINGS[part], 0))
                except (LookupError, ValueError) as error:
                    raise ValueError(f"{part}.{name}.says can't be filled in: {error!r}") from None
        return self

    def xid(self, code: int) -> XidRow:
        """The row of that error, or that of all others."""
        return self.xids.get(code) or self.xids["other"]

    def rates_of(self, device: str) -> Rates | None:
        """Of a GPU as torch or NVML names it."""
        return next((rates for rates in self.rates if rates.match in device), None)


def load(override: Path | None = None) -> Table:
    """The table, with an administrator's rows in it; raises UserError that names the file and the row.

    The file has the same form, and holds only what it changes: fields of rows that are there, or whole new rows. Its
    rates go before the others."""
    raw = yaml.safe_load(DEFAULTS.read_text())
    if override is None:
        return Table.model_validate(raw)
    try:
        changes = yaml.safe_load(override.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{override} can't be read as YAML: {error}") from None
    try:
        return Table.model_validate(merged(raw, changes or {}))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part not in ("int", "str"))
        raise UserError(
            f"{override}: {place + ': ' if place else ''}{first['msg'].removeprefix('Value error, ')}. See "
            "findings.yaml of lockstep_trainer.health for the form of each row."
        ) from None
    except TypeError as error:
        raise UserError(f"{override}: {error}") from None


def merged(raw: Mapping[str, Any], changes: Any) -> dict[str, Any]:
    """``raw`` with ``changes``: row by row, and in a row field by field. Raises TypeError that names the part."""
    if not isinstance(changes, dict):
        raise TypeError("it must be an object with parts such as gpu and xids")
    result = dict(raw)
    for part, rows in changes.items():
        if part == "rates" and isinstance(rows, list):
            result[part] = [*rows, *raw[part]]
        elif isinstance(rows, dict) and isinstance(raw.get(part), dict):
            names = {name: int(name) if str(name).isdigit() else name for name in rows}  # Helm makes text of numbers
            changed = {names[name]: _row(raw[part].get(names[name]), row) for name, row in rows.items()}
            result[part] = {**raw[part], **changed}
        else:
            raise TypeError(f"{part}: known parts are {', '.join(raw)}; rates is a list, the others are objects")
    return result


def _row(old: Any, new: Any) -> Any:
    """An own bound takes the place of the default's."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return new
    bounds = {"set", "above", "below", "bits", "less_than", "above_share", "of"}
    kept = {key: value for key, value in old.items() if key not in bounds} if bounds & new.keys() else old
    return {**kept, **new}
