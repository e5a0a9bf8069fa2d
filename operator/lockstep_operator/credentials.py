"""What the operator's jobs and the operator itself prove with who they are: tokens and certificates, all derived from
the master key."""

from __future__ import annotations

import hashlib
import hmac
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from lockstep_api import constants, tls
from lockstep_operator.certificates import Authority
from lockstep_operator.plan.renewal import Validity, window


@dataclass(frozen=True, slots=True)
class MasterKeys:
    """``current`` makes all tokens and certificates; those made with ``accepted`` are believed too, so that a key can
    be changed under running jobs."""

    current: bytes = field(repr=False)
    accepted: tuple[bytes, ...] = field(default=(), repr=False)


class Credentials:
    """For all jobs of an operator."""

    def __init__(
        self, keys: MasterKeys, validity: Validity | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        self._keys, self.validity, self._clock = keys, validity or Validity(), clock
        self._authority = Authority.derive(keys.current)
        self._believes = b"".join(Authority.derive(key).pem for key in keys.accepted)
        self._own: tuple[int, ssl.SSLContext] | None = None

    def token(self, job_uid: str) -> str:
        """The job's bearer token: HMAC-SHA256 of its uid under the master key, so that a job that is created again gets
        another one."""
        return _token(self._keys.current, job_uid)

    def version(self, job_uid: str) -> str:
        """Changes when ``secret`` does."""
        number = window(tls.agents_name(job_uid), self.validity, self._clock())
        return f"{self.validity.renew_seconds:g}/{number}"

    def secret(self, job_uid: str) -> dict[str, bytes]:
        """The data of the job's Secret now."""
        name = tls.agents_name(job_uid)
        number = window(name, self.validity, self._clock())
        material = self._authority.issue(name, self.validity, number, believes=self._believes)
        accepted = "\n".join(_token(key, job_uid) for key in self._keys.accepted)
        return {
            constants.TOKEN_FILE: self.token(job_uid).encode(),
            **({constants.ACCEPTED_TOKENS_FILE: accepted.encode()} if accepted else {}),
            tls.CERTIFICATE_FILE: material.certificate,
            tls.KEY_FILE: material.key,
            tls.AUTHORITIES_FILE: material.authorities,
        }

    def context(self, job_uid: str) -> ssl.SSLContext:
        """To call the job's agents with, for as long as this process lives: it is renewed by itself."""
        return tls.Rotating(self._client, tls.agents_name(job_uid))

    def _client(self) -> ssl.SSLContext:
        number = window(tls.OPERATOR_NAME, self.validity, self._clock())
        if self._own is None or self._own[0] != number:
            material = self._authority.issue(tls.OPERATOR_NAME, self.validity, number, believes=self._believes)
            self._own = number, material.client()
        return self._own[1]


def _token(key: bytes, job_uid: str) -> str:
    return hmac.new(key, job_uid.encode(), hashlib.sha256).hexdigest()
