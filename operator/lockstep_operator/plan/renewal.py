"""When certificates are made anew: a pure function of the time, so that nobody has to remember what was made last.

Time is cut into windows, a renewal long. All that is issued for one name in one window is the same certificate, valid
from the start of its window; each name's windows start at another instant, so that jobs are not renewed all at once.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

from lockstep_operator.errors import ConfigError

SKEW_SECONDS = 300.0
"""Certificates are valid so long before they are made, for nodes whose clocks are behind: what Kubernetes' own signer
allows (kube-controller-manager, `pkg/controller/certificates/signer`, backdate of five minutes)."""


@dataclass(frozen=True, slots=True)
class Validity:
    """How long a certificate is valid, and after how much of it the next one is made. The default survives twenty days
    without an operator."""

    seconds: float = 30 * 86400.0
    renew_seconds: float = 10 * 86400.0

    def __post_init__(self) -> None:
        if self.renew_seconds <= 0:
            raise ConfigError(f"certificates are renewed every {self.renew_seconds:g} s; it must be more than 0")
        if self.seconds < 2 * self.renew_seconds:
            raise ConfigError(
                f"certificates are valid for {self.seconds:g} s and renewed every {self.renew_seconds:g} s; they must "
                "be valid for twice as long as that, so that a renewal may come late"
            )


def window(name: str, validity: Validity, now: float) -> int:
    """The window that ``now`` (Unix seconds) is in."""
    return math.floor((now + _offset(name, validity)) / validity.renew_seconds)


def period(name: str, validity: Validity, number: int) -> tuple[float, float]:
    """From when to when the certificate of a window is valid, in Unix seconds."""
    start = number * validity.renew_seconds - _offset(name, validity)
    return start - SKEW_SECONDS, start + validity.seconds


def _offset(name: str, validity: Validity) -> float:
    share = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) / 2**32
    return share * validity.renew_seconds
