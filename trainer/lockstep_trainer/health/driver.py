"""NVML itself, through NVIDIA's own bindings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pynvml  # type: ignore[import-untyped]  # NVIDIA's bindings have no types

from lockstep_trainer.health.nvml import Refused
from lockstep_trainer.health.readings import Xid

_PREFIX = "NVMLError_"
_CONSTANTS: dict[str, tuple[str, ...]] = {
    # Question → how its arguments are called in pynvml, one format for each.
    "ClockInfo": ("NVML_CLOCK_{}",),
    "MaxClockInfo": ("NVML_CLOCK_{}",),
    "TotalEccErrors": ("NVML_MEMORY_ERROR_TYPE_{}", "NVML_{}_ECC"),
    "MemoryErrorCounter": ("NVML_MEMORY_ERROR_TYPE_{}", "NVML_{}_ECC", "NVML_MEMORY_LOCATION_{}"),
    "TemperatureThreshold": ("NVML_TEMPERATURE_THRESHOLD_{}",),
}
_VALUE = ("dVal", "uiVal", "ulVal", "ullVal", "sllVal", "siVal", "usVal")
"""Member of a field value's union, by its valueType."""


class DriverNvml:
    """NVML in this process. Raises Refused where there is no driver. A GPU in a bad state may hold a call for ever: use
    it in a process that may be killed."""

    def __init__(self) -> None:
        _call(pynvml.nvmlInit)

    def count(self) -> int:
        """GPUs that the driver knows and this container may see."""
        return int(_call(pynvml.nvmlDeviceGetCount))

    def ask(self, gpu: int, question: str) -> Any:
        """See Nvml."""
        name, *arguments = question.split()
        if name == "DriverVersion":
            return _plain(_call(pynvml.nvmlSystemGetDriverVersion))
        handle = _call(pynvml.nvmlDeviceGetHandleByIndex, gpu)
        if name == "Field":
            return self._field(handle, arguments[0])
        values: list[int]
        if name == "Temperature":
            values = [pynvml.NVML_TEMPERATURE_GPU]
        elif name == "NvLinkState":
            values = [int(arguments[0])]
        else:
            formats = _CONSTANTS.get(name, ())
            values = [getattr(pynvml, form.format(one)) for form, one in zip(formats, arguments, strict=True)]
        return _plain(_call(getattr(pynvml, f"nvmlDeviceGet{name}"), handle, *values))

    @contextmanager
    def listen(self) -> Iterator[_Events]:
        """An event set with the critical errors of every GPU that has them."""
        chosen = _call(pynvml.nvmlEventSetCreate)
        try:
            for index in range(self.count()):
                with suppress(Refused):  # a lost GPU, or one without events
                    handle = _call(pynvml.nvmlDeviceGetHandleByIndex, index)
                    _call(pynvml.nvmlDeviceRegisterEvents, handle, pynvml.nvmlEventTypeXidCriticalError, chosen)
            yield _Events(chosen)
        finally:
            with suppress(Refused):
                _call(pynvml.nvmlEventSetFree, chosen)

    def _field(self, handle: Any, name: str) -> Any:
        found = _call(pynvml.nvmlDeviceGetFieldValues, handle, [getattr(pynvml, f"NVML_FI_{name}")])[0]
        if found.nvmlReturn != pynvml.NVML_SUCCESS:
            raise _refused(pynvml.NVMLError(found.nvmlReturn))
        return getattr(found.value, _VALUE[found.valueType])


class _Events:
    def __init__(self, chosen: Any) -> None:
        self._set = chosen

    def heard(self) -> list[Xid]:
        """All that have come, without waiting."""
        found: list[Xid] = []
        while True:
            try:
                event = _call(pynvml.nvmlEventSetWait, self._set, 0)
            except Refused as refused:
                if refused.code != "Timeout":
                    raise
                return found
            found.append(Xid(_index(event.device), int(event.eventData)))


def _index(handle: Any) -> int | None:
    try:
        return int(_call(pynvml.nvmlDeviceGetIndex, handle))
    except Refused:  # it is lost
        return None


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except pynvml.NVMLError as error:
        raise _refused(error) from None


def _refused(error: Any) -> Refused:
    return Refused(type(error).__name__.removeprefix(_PREFIX), str(error))


def _plain(value: Any) -> Any:
    """ctypes structures as objects, bytes as text."""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if hasattr(value, "_fields_"):
        return {field[0]: _plain(getattr(value, field[0])) for field in value._fields_}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value
