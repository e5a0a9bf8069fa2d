"""TLS as a job's parts speak it to each other: names, contexts, and certificates that change under open connections.

Peers are known by a name of their job and never by an address, since pods' addresses change. Standard library only:
what signs certificates is the operator's.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

OPERATOR_NAME = "operator.lockstep"
"""In the certificate that the operator shows to agents."""
CERTIFICATE_FILE, KEY_FILE, AUTHORITIES_FILE = "tls.crt", "tls.key", "ca.crt"
"""Keys of the job's Secret, as Kubernetes spells them in a Secret of type kubernetes.io/tls."""
_FLIGHTS = 4  # more than a handshake of TLS 1.3 takes


def agents_name(job_uid: str) -> str:
    """In the certificate that all agents of a job show, to each other and to the operator."""
    return f"{job_uid}.agents.lockstep"


@dataclass(frozen=True, slots=True)
class Material:
    """PEM texts: a certificate, its key, and the authorities whose certificates are believed."""

    certificate: bytes
    key: bytes = field(repr=False)
    authorities: bytes

    @classmethod
    def read(cls, folder: Path) -> Self:
        """From the files of a mounted Secret; raises OSError. The folder is resolved once, so that the three belong
        together where the kubelet replaces it meanwhile."""
        folder = (folder / CERTIFICATE_FILE).resolve().parent
        return cls(*((folder / name).read_bytes() for name in (CERTIFICATE_FILE, KEY_FILE, AUTHORITIES_FILE)))

    def client(self) -> ssl.SSLContext:
        """For who calls. Raises ssl.SSLError where certificate and key don't fit together, ValueError where one is not
        PEM."""
        return self._load(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))

    def server(self) -> ssl.SSLContext:
        """For who is called: a caller's certificate is verified where it shows one, and who may come without is for
        the server to say. Raises as ``client``."""
        context = self._load(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
        context.verify_mode = ssl.CERT_OPTIONAL
        context.num_tickets = 0  # a resumed session would pass over the certificate that has expired meanwhile
        return context

    def _load(self, context: ssl.SSLContext) -> ssl.SSLContext:
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_verify_locations(cadata=self.authorities.decode())
        # The library reads files only; this one is in memory and gone when it is closed.
        descriptor = os.memfd_create("certificate")
        try:
            with os.fdopen(os.dup(descriptor), "wb") as file:
                file.write(self.certificate + b"\n" + self.key)
            context.load_cert_chain(f"/proc/self/fd/{descriptor}")
        finally:
            os.close(descriptor)
        return context


class Rotating(ssl.SSLContext):
    """A context that is given to a server or a client once, while each new connection is made with whatever
    ``current`` returns then. Connections that are open keep what they were made with."""

    _current: Callable[[], ssl.SSLContext]
    _peer: str | None

    def __new__(cls, current: Callable[[], ssl.SSLContext], peer: str | None = None) -> Self:
        """A client names its ``peer``, whatever address it is called at; a server has none."""
        self = super().__new__(cls, ssl.PROTOCOL_TLS_SERVER if peer is None else ssl.PROTOCOL_TLS_CLIENT)
        self._current, self._peer = current, peer
        return self

    def __init__(self, current: Callable[[], ssl.SSLContext], peer: str | None = None) -> None: ...

    def wrap_bio(
        self,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
        server_side: bool = False,
        server_hostname: str | bytes | None = None,
        session: ssl.SSLSession | None = None,
    ) -> ssl.SSLObject:
        """What asyncio calls for each connection."""
        return self._current().wrap_bio(
            incoming, outgoing, server_side=server_side, server_hostname=None if server_side else self._peer
        )


def rehearse(server: ssl.SSLContext, client: ssl.SSLContext, peer: str) -> Mapping[str, Any]:
    """A whole handshake in memory; the certificate that the server was shown, as ``getpeercert`` gives it, or {} where
    the client has none. Raises ssl.SSLError: so all that can be wrong with certificates is found before they are
    used."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    called = server.wrap_bio(to_server, to_client, server_side=True)
    calling = client.wrap_bio(to_client, to_server, server_hostname=peer)
    for _ in range(_FLIGHTS):
        waiting = 0
        for end in (calling, called):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                waiting += 1
        if not waiting:
            break
    return called.getpeercert() or {}


def names(certificate: Mapping[str, Any] | None) -> frozenset[str]:
    """The DNS names of a verified certificate, as ``getpeercert`` gives it."""
    entries = (certificate or {}).get("subjectAltName", ())
    return frozenset(value for kind, value in entries if kind == "DNS")


@dataclass(frozen=True, slots=True)
class Valid:
    """From when to when a certificate is valid, in Unix seconds."""

    since: float
    until: float

    @classmethod
    def of(cls, certificate: Mapping[str, Any]) -> Self:
        """As ``getpeercert`` gives it."""
        return cls(*(float(ssl.cert_time_to_seconds(certificate[name])) for name in ("notBefore", "notAfter")))

    def share_left(self, now: float) -> float:
        """1 when it begins, 0 when it has ended."""
        return min(1.0, max(0.0, (self.until - now) / (self.until - self.since)))
