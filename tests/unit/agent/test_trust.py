"""What an agent believes, and how it takes up what has changed."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from aiohttp import ClientConnectionError, ClientConnectorError, ClientSession, WSMsgType, web

from lockstep_api import tls
from lockstep_api.tls import Valid
from lockstep_operator.credentials import Credentials, MasterKeys
from lockstep_operator.plan.renewal import Validity
from lockstep_trainer.agent.server import Server
from lockstep_trainer.agent.settings import SettingsError
from lockstep_trainer.agent.trust import Trust

UID, KEY = "6f0c", b"a master key of this operator"
VALIDITY = Validity(7200, 3600)


def credentials(after: float = 0.0, *accepted: bytes, key: bytes = KEY) -> Credentials:
    now = time.time() + after
    return Credentials(MasterKeys(key, accepted), VALIDITY, clock=lambda: now)


def mount(folder: Path, made: Credentials, uid: str = UID, *, without: str = "") -> Path:
    """The Secret as the kubelet shows it: links into a folder that is exchanged as one."""
    number = len(list(folder.glob("..2*")))
    data = folder / f"..2026-{number}"
    data.mkdir(parents=True)
    for name, content in made.secret(uid).items():
        if name != without:
            (data / name).write_bytes(content)
            if not (folder / name).is_symlink():
                (folder / name).symlink_to(Path("..data", name))
    fresh = folder / "..data_tmp"
    fresh.symlink_to(data.name)
    fresh.replace(folder / "..data")
    return folder


def material(made: Credentials, uid: str) -> tls.Material:
    secret = made.secret(uid)
    return tls.Material(secret["tls.crt"], secret["tls.key"], secret["ca.crt"])


def test_a_renewed_certificate_is_taken_up(tmp_path: Path) -> None:
    trust = Trust(mount(tmp_path, credentials(-3600)), UID, use_tls=True)
    first = trust.valid
    trust.look()
    assert trust.valid == first
    mount(tmp_path, credentials())
    trust.look()
    assert first is not None
    assert trust.valid == Valid(first.since + 3600, first.until + 3600)


@pytest.mark.parametrize(
    ("replacement", "uid"),
    [
        (credentials(-5 * 3600), UID),  # expired
        (credentials(5 * 3600), UID),  # not yet valid here
        (credentials(), "another-job"),
    ],
)
def test_what_can_not_be_used_is_not_taken_up_and_does_no_harm(
    tmp_path: Path, replacement: Credentials, uid: str
) -> None:
    trust = Trust(mount(tmp_path, credentials(-3600)), UID, use_tls=True)
    first = trust.valid
    mount(tmp_path, replacement, uid)
    trust.look()
    assert trust.valid == first
    mount(tmp_path, credentials())
    trust.look()
    assert trust.valid != first


def test_a_certificate_beside_another_ones_key_is_not_taken_up(tmp_path: Path) -> None:
    """Files of a local run are replaced one by one."""
    for name, content in credentials(-3600).secret(UID).items():
        (tmp_path / name).write_bytes(content)
    trust = Trust(tmp_path, UID, use_tls=True)
    first, renewed = trust.valid, credentials().secret(UID)
    (tmp_path / "tls.crt").write_bytes(renewed["tls.crt"])
    trust.look()
    assert trust.valid == first
    (tmp_path / "tls.key").write_bytes(renewed["tls.key"])
    trust.look()
    assert trust.valid != first


@pytest.mark.parametrize(
    ("made", "uid", "says"),
    [
        (credentials(-5 * 3600), UID, "expired; compare this node's clock"),
        (credentials(5 * 3600), UID, "not yet valid; compare this node's clock"),
        (credentials(), "another-job", "not valid for '6f0c.agents.lockstep'"),
    ],
)
def test_an_agent_that_can_not_use_its_certificate_says_why(
    tmp_path: Path, made: Credentials, uid: str, says: str
) -> None:
    with pytest.raises(SettingsError, match=f"tls.crt can't be used: .*{says}"):
        Trust(mount(tmp_path, made, uid), UID, use_tls=True)


def test_an_agent_without_its_certificate_never_speaks_plainly(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"tls.crt can't be read"):
        Trust(mount(tmp_path, credentials(), without="tls.crt"), UID, use_tls=True)


def test_what_can_not_be_used_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is looked at every few seconds, for as long as a clock is wrong."""
    trust = Trust(mount(tmp_path, credentials()), UID, use_tls=True)
    mount(tmp_path, credentials(5 * 3600))
    for _ in range(3):
        trust.look()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    (tmp_path / "token").unlink()
    (tmp_path / "token").write_bytes(b"\xff")
    trust.look()
    assert caplog.records[1].message.startswith(f"{tmp_path / 'token'} is no text")


def test_tokens_of_an_accepted_key_are_known_while_they_are_mounted(tmp_path: Path) -> None:
    other = b"a master key of tomorrow"
    trust = Trust(mount(tmp_path, credentials()), UID, use_tls=True)
    coming = credentials(key=other).token(UID)
    assert trust.knows(credentials().token(UID))
    assert not trust.knows(coming)
    assert not trust.knows("")
    mount(tmp_path, credentials(0, other))
    trust.look()
    assert trust.knows(coming)


# ------------------------------------------------------------------------------------------ who may call what


@asynccontextmanager
async def serving(trust: Trust) -> AsyncIterator[str]:
    """The agent's server, with its handlers exchanged for ones that answer "in"."""

    async def handler(request: web.Request) -> web.StreamResponse:
        if request.path != "/v1/member":
            return web.Response(text="in")
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        async for frame in socket:
            await socket.send_str(frame.data)
        return socket

    agent = SimpleNamespace(
        trust=trust, snapshots=None, job=SimpleNamespace(spec={"gpusPerNode": 1}), settings=SimpleNamespace(bind="")
    )
    middlewares = list(Server(agent).app.middlewares)  # type: ignore[arg-type]
    app = web.Application(middlewares=middlewares)
    for path in (*PATHS, "/v1/workers/{rank:\\d+}/log", "/healthz"):
        app.router.add_get(path, handler)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=trust.server_context).start()
    try:
        yield f"127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


PATHS = ("/v1/inventory", "/v1/operator", "/v1/snapshots/0/1-1-1", "/v1/member")
TOKEN = {"Authorization": f"Bearer {credentials().token(UID)}"}


async def status(address: str, path: str, context: ssl.SSLContext, headers: dict[str, str] = TOKEN) -> int:
    async with ClientSession() as session, session.get(f"https://{address}{path}", headers=headers, ssl=context) as got:
        return got.status


def blind() -> ssl.SSLContext:
    """As the API server's proxy calls: it verifies nothing and shows nothing."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def as_job(uid: str) -> ssl.SSLContext:
    """A pod of a job of the same operator, which believes whatever it finds."""
    context = material(credentials(), uid).client()
    context.check_hostname = False
    return context


def test_it_takes_certificate_and_token(tmp_path: Path) -> None:
    async def main() -> None:
        trust = Trust(mount(tmp_path, credentials()), UID, use_tls=True)
        async with serving(trust) as address:
            member, operator = trust.call()["ssl"], credentials().context(UID)
            for path in ("/v1/inventory", "/v1/snapshots/0/1-1-1"):
                assert await status(address, path, member) == 200
                assert await status(address, path, operator) == 200
                assert await status(address, path, operator, {}) == 401  # no token
                assert await status(address, path, blind()) == 403  # no certificate
                assert await status(address, path, as_job("another")) == 403  # another job's
            assert await status(address, "/v1/operator", operator) == 200
            assert await status(address, "/v1/operator", member) == 403  # no pod gives orders
            assert await status(address, "/healthz", blind(), {}) == 200
            # People come through the API server, which asks them for their rights.
            assert await status(address, "/v1/workers/0/log", blind()) == 200
            assert await status(address, "/v1/workers/0/log", blind(), {}) == 401
            assert await status(address, "/v1/workers/0/log", as_job("another")) == 403

    asyncio.run(main())


def test_a_caller_with_another_authoritys_certificate_gets_no_answer(tmp_path: Path) -> None:
    async def main() -> None:
        trust = Trust(mount(tmp_path, credentials()), UID, use_tls=True)
        async with serving(trust) as address:
            stranger = material(credentials(key=b"a key of somebody else's"), UID).client()
            stranger.check_hostname, stranger.verify_mode = False, ssl.CERT_NONE
            with pytest.raises(ClientConnectionError):
                await status(address, "/healthz", stranger, {})
            expired = material(credentials(-5 * 3600), UID).client()
            expired.check_hostname = False
            with pytest.raises(ClientConnectionError):
                await status(address, "/healthz", expired, {})
            with pytest.raises(ClientConnectorError):  # and it finds nobody who calls without TLS
                async with ClientSession() as session, session.get(f"https://{address}/healthz"):
                    pass

    asyncio.run(main())


def test_open_streams_go_on_and_new_ones_show_the_renewed_certificate(tmp_path: Path) -> None:
    async def main() -> None:
        trust = Trust(mount(tmp_path, credentials(-3600)), UID, use_tls=True)
        expires = trust.valid
        async with serving(trust) as address, ClientSession() as session:

            def ends(socket: object) -> Valid:
                return Valid.of(socket.get_extra_info("peercert"))  # type: ignore[attr-defined]

            before = await session.ws_connect(trust.url(address, "/v1/member"), **trust.call())
            mount(tmp_path, credentials())
            trust.look()
            after = await session.ws_connect(trust.url(address, "/v1/member"), **trust.call())
            assert (ends(before), ends(after)) == (expires, trust.valid)
            assert expires != trust.valid
            for socket in (before, after):
                await socket.send_str("still here")
                frame = await socket.receive(timeout=10)
                assert (frame.type, frame.data) == (WSMsgType.TEXT, "still here")
                await socket.close()

    asyncio.run(main())
