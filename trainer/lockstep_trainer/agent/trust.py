"""What this agent shows to others and believes of them: token and certificate from the job's mounted Secret, read again
when it changes. Connections that are open go on; new ones are made with what is newest."""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lockstep_api import constants, tls
from lockstep_trainer.agent.settings import SettingsError

log = logging.getLogger(__name__)

POLL_SECONDS = 5.0
"""The kubelet brings a changed Secret within about a minute; a few ``stat`` more often than that find it soon."""
_WRONG_TIME = (9, 10)  # OpenSSL's X509_V_ERR_CERT_NOT_YET_VALID and X509_V_ERR_CERT_HAS_EXPIRED


@dataclass(frozen=True, slots=True)
class _Loaded:
    token: str
    accepted: tuple[str, ...]
    server: ssl.SSLContext | None = None
    client: ssl.SSLContext | None = None
    valid: tls.Valid | None = None


class Trust:
    """Raises SettingsError where what is mounted can't be used."""

    def __init__(self, folder: Path, job_uid: str, *, use_tls: bool) -> None:
        self._folder, self._job_uid, self._name, self._tls = folder, job_uid, tls.agents_name(job_uid), use_tls
        self._seen = self._refused = self._signature()
        self._now = self._load()
        self.server_context = tls.Rotating(lambda: _need(self._now.server)) if use_tls else None
        self._client_context = tls.Rotating(lambda: _need(self._now.client), self._name) if use_tls else None

    @property
    def arguments(self) -> tuple[str, str, str]:
        """What makes the same again, as the words of a command: folder, job's uid, on or off."""
        return str(self._folder), self._job_uid, "on" if self._tls else "off"

    # ------------------------------------------------------------------------------------------ calling

    def url(self, address: str, path: str) -> str:
        """Of a path at another agent (host:port) of this job: all of them speak TLS, or none."""
        return f"{'https' if self._tls else 'http'}://{address}{path}"

    @property
    def token(self) -> str:
        """To show."""
        return self._now.token

    def wrap(self, connection: socket.socket, *, called: bool) -> socket.socket:
        """A connection that blocks, behind its handshake, at the end that was ``called`` or calls; as it is without
        TLS. Raises OSError."""
        context = self._now.server if called else self._now.client
        if context is None:
            return connection
        return context.wrap_socket(connection, server_side=called, server_hostname=None if called else self._name)

    def call(self) -> dict[str, Any]:
        """Arguments of aiohttp's requests: who calls, and whom it believes to be called."""
        headers = {"Authorization": f"Bearer {self._now.token}"}
        return {"headers": headers, "ssl": self._client_context or True}

    # ---------------------------------------------------------------------------------------- being called

    def knows(self, token: str) -> bool:
        """Whether a token is this job's."""
        return any(hmac.compare_digest(token.encode(), good.encode()) for good in self._now.accepted)

    def refusal(self, certificate: Any, *, operator_only: bool, needed: bool) -> str | None:
        """Why whoever showed this certificate (as ``getpeercert`` gives it, None for none) may not go on. The handshake
        has verified that the operator's authority has signed it; what remains is for whom."""
        if not self._tls:
            return None
        if not certificate:
            return "a certificate of this job is needed here" if needed else None
        shown = tls.names(certificate)
        if shown & ({tls.OPERATOR_NAME} if operator_only else {tls.OPERATOR_NAME, self._name}):
            return None
        return f"the certificate is of {', '.join(sorted(shown)) or 'nobody'}, and not one that may call this"

    @property
    def valid(self) -> tls.Valid | None:
        """From when to when the certificate in use is valid; None without TLS."""
        return self._now.valid

    # ------------------------------------------------------------------------------------------- reloading

    async def watch(self) -> None:
        """Reload what has changed, until cancelled."""
        while True:
            await asyncio.sleep(POLL_SECONDS)
            self.look()

    def look(self) -> None:
        """Reload if something has changed. What can't be used is passed over until it can: a half-written folder, or a
        certificate that this node's clock does not hold for valid yet."""
        if (signature := self._signature()) == self._seen:
            return
        try:
            self._now = self._load()
        except SettingsError as error:
            if signature != self._refused:  # said once, and tried until it is good
                log.warning("%s; the one before stays in use", error)
            self._refused = signature
            return
        self._seen = signature
        log.info("token and certificate were read anew from %s", self._folder)

    def _signature(self) -> tuple[tuple[int, int], ...]:
        names = (constants.TOKEN_FILE, constants.ACCEPTED_TOKENS_FILE, tls.CERTIFICATE_FILE, tls.KEY_FILE)
        found = []
        for name in (*names, tls.AUTHORITIES_FILE):
            try:
                stat = os.stat(self._folder / name)
                found.append((stat.st_ino, stat.st_mtime_ns))
            except OSError:
                found.append((0, 0))
        return tuple(found)

    def _load(self) -> _Loaded:
        file = self._folder / constants.TOKEN_FILE
        try:
            token = file.read_text().strip()
            others = self._folder / constants.ACCEPTED_TOKENS_FILE
            accepted = (token, *(others.read_text().split() if others.exists() else ()))
            if not self._tls:
                return _Loaded(token, accepted)
            file = self._folder / tls.CERTIFICATE_FILE
            material = tls.Material.read(self._folder)
        except OSError as error:
            raise SettingsError(f"{error.filename or file} can't be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise SettingsError(f"{file} is no text") from None
        try:
            server, client = material.server(), material.client()
            certificate = tls.rehearse(server, client, self._name)
        except (ssl.SSLError, ValueError) as error:
            raise SettingsError(f"{file} can't be used: {_reason(error)}") from None
        return _Loaded(token, accepted, server, client, tls.Valid.of(certificate))


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        hint = "; compare this node's clock with the operator's" if error.verify_code in _WRONG_TIME else ""
        return f"{error.verify_message}{hint}"
    return str(error)


def _need(context: ssl.SSLContext | None) -> ssl.SSLContext:
    assert context is not None
    return context
