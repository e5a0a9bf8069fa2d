"""What goes to an S3 server, and what happens where it answers wrongly, late or not at all.

A real server answers; requests are looked at, altered or refused on their way to it.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from uuid import uuid4

import pytest
from botocore.awsrequest import AWSResponse
from botocore.httpsession import URLLib3Session

from lockstep_api.v1alpha1 import S3Spec
from lockstep_api.v1alpha1.checkpoint import EncryptionSpec
from lockstep_trainer.errors import StoreError
from lockstep_trainer.storage import pacing, s3knows, s3parts
from lockstep_trainer.storage.checksum import crc64nvme
from lockstep_trainer.storage.probe import probe
from lockstep_trainer.storage.s3 import S3Store
from lockstep_trainer.storage.s3client import client_of

LARGE = 2 * s3parts.PART + 12_345
DATA = random.Random(2).randbytes(LARGE)
CHECKSUM = crc64nvme(DATA)
SMALL = DATA[:5000]
SIZES = pytest.mark.parametrize("data", [SMALL, DATA], ids=["small", "large"])

Handler = Callable[[str, Any], AWSResponse | None]


class Wire:
    """The way between client and server. Handlers get operation and request; what one returns is the answer.

    ``altering`` may change a request before it is signed.
    """

    def __init__(self) -> None:
        self.seen: list[tuple[str, Any]] = []
        self.handlers: list[Handler] = []
        self.altering: list[Callable[[str, Any], None]] = []
        self._lock = threading.Lock()

    def __call__(self, request: Any, event_name: str, **_: Any) -> AWSResponse | None:
        operation = event_name.rsplit(".", 1)[-1]
        with self._lock:
            self.seen.append((operation, request))
            for handler in self.handlers:
                if (answer := handler(operation, request)) is not None:
                    return answer
        return None

    def alter(self, request: Any, operation_name: str, **_: Any) -> None:
        for alter in self.altering:
            alter(operation_name, request)

    def requests(self, operation: str) -> list[Any]:
        return [request for name, request in self.seen if name == operation]


class Body:
    def __init__(self, data: bytes) -> None:
        self._data = data

    def stream(self, **_: Any) -> Iterator[bytes]:
        yield self._data


def answer(status: int, code: str) -> AWSResponse:
    text = f"<Error><Code>{code}</Code><Message>as the test says</Message></Error>"
    return AWSResponse("", status, {}, Body(text.encode()))


class Bench:
    """A store of its own, with its wire."""

    def __init__(self, endpoint: str, **spec: Any) -> None:
        self.spec = S3Spec(endpoint=endpoint, path_style=True, **spec)
        self.store = S3Store("lockstep-test", uuid4().hex, self.spec)
        self.wire = Wire()
        client_of(self.spec).meta.events.register_first("before-send.s3", self.wire)
        client_of(self.spec).meta.events.register_first("before-sign.s3", self.wire.alter)


@pytest.fixture
def bench(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Bench]]:
    """Makes a Bench. Nobody waits between tries."""
    monkeypatch.setattr(time, "sleep", lambda _: None)
    monkeypatch.setattr(s3knows, "_known", {})
    made: list[Bench] = []

    def make(**spec: Any) -> Bench:
        made.append(Bench(s3_endpoint, **spec))
        return made[-1]

    yield make
    for each in made:
        client_of(each.spec).meta.events.unregister("before-send.s3", each.wire)
        client_of(each.spec).meta.events.unregister("before-sign.s3", each.wire.alter)


def nothing_is_left(store: S3Store) -> bool:
    return store.list() == () and store.unfinished() == ()


@pytest.mark.parametrize(
    ("spec", "headers"),
    [
        ({"type": "AES256"}, {"x-amz-server-side-encryption": "AES256"}),
        (
            {"type": "aws:kms", "kmsKeyId": "alias/mine"},
            {
                "x-amz-server-side-encryption": "aws:kms",
                "x-amz-server-side-encryption-aws-kms-key-id": "alias/mine",
            },
        ),
        (None, {}),
    ],
)
def test_encryption_is_asked_for_on_every_object(
    bench: Callable[..., Bench], spec: dict[str, str] | None, headers: dict[str, str]
) -> None:
    one = bench(encryption=EncryptionSpec.model_validate(spec) if spec else None)
    one.store.put("manifest.json", b"1", only_if_absent=True)
    one.store.put_buffer("small", SMALL, crc64nvme=crc64nvme(SMALL))
    one.store.put_buffer("large", DATA, crc64nvme=CHECKSUM)
    made = one.wire.requests("PutObject") + one.wire.requests("CreateMultipartUpload")
    assert len(made) == 5  # two of them ask whether the server verifies
    for request in made:
        sent = {name.lower(): value.decode() for name, value in request.headers.items() if isinstance(value, bytes)}
        sent |= {name.lower(): value for name, value in request.headers.items() if isinstance(value, str)}
        assert {name: sent[name] for name in sent if "encryption" in name} == headers


def test_every_object_and_every_part_names_its_checksum_and_condition(bench: Callable[..., Bench]) -> None:
    one = bench()
    one.store.put_buffer("large", DATA, crc64nvme=CHECKSUM)
    parts = one.wire.requests("UploadPart")
    assert len(parts) == 3
    assert all("x-amz-checksum-crc64nvme" in request.headers for request in parts)
    (completed,) = one.wire.requests("CompleteMultipartUpload")
    assert {"x-amz-checksum-crc64nvme", "x-amz-checksum-type", "If-None-Match"} <= set(completed.headers)
    assert one.store.head("large").crc64nvme == CHECKSUM


def damaging(operations: set[str], times: int) -> Handler:
    """Flips a byte of the bodies of the next so many requests."""
    left = [times]

    def damage(operation: str, request: Any) -> None:
        if operation not in operations or not left[0]:
            return
        data = bytearray(request.body.read())
        request.body.seek(0)
        if len(data) > 1000:  # those of the probe pass
            left[0] -= 1
            data[100] ^= 1
            request.body = bytes(data)

    return damage


@SIZES
def test_bytes_that_were_damaged_on_the_way_are_sent_again(bench: Callable[..., Bench], data: bytes) -> None:
    one = bench()
    one.wire.handlers.append(damaging({"PutObject", "UploadPart"}, 1))
    one.store.put_buffer("data", data, crc64nvme=crc64nvme(data))
    memory = memoryview(bytearray(len(data)))
    assert one.store.get_into("data", 0, memory) == len(data)
    assert memory == data


@SIZES
def test_bytes_that_are_damaged_every_time_are_not_stored(bench: Callable[..., Bench], data: bytes) -> None:
    one = bench()
    one.wire.handlers.append(damaging({"PutObject", "UploadPart"}, 1000))
    with pytest.raises(StoreError) as caught:
        one.store.put_buffer("data", data, crc64nvme=crc64nvme(data))
    assert caught.value.temporary
    assert nothing_is_left(one.store)


def failing(operation: str, times: int, status: int, code: str) -> Handler:
    left = [times]

    def fail(name: str, _: Any) -> AWSResponse | None:
        if name != operation or not left[0]:
            return None
        left[0] -= 1
        return answer(status, code)

    return fail


@pytest.mark.parametrize("operation", ["UploadPart", "CompleteMultipartUpload", "CreateMultipartUpload"])
def test_a_busy_server_is_asked_again(bench: Callable[..., Bench], operation: str) -> None:
    one = bench()
    times = 2 if operation == "CreateMultipartUpload" else 5  # more than boto3 itself tries
    one.wire.handlers.append(failing(operation, times, 503, "SlowDown"))
    one.store.put_buffer("data", DATA, crc64nvme=CHECKSUM)
    assert one.store.head("data").crc64nvme == CHECKSUM
    assert one.store.unfinished() == ()


def test_reading_goes_on_where_the_server_was_busy(bench: Callable[..., Bench]) -> None:
    one = bench()
    one.store.put_buffer("data", DATA, crc64nvme=CHECKSUM)
    one.wire.handlers.append(failing("GetObject", 5, 503, "SlowDown"))
    memory = memoryview(bytearray(LARGE))
    assert one.store.get_into("data", 0, memory) == LARGE
    assert memory == DATA


@pytest.mark.parametrize(
    ("status", "code", "temporary"), [(403, "AccessDenied", False), (503, "ServiceUnavailable", True)]
)
def test_an_upload_that_fails_leaves_nothing(
    bench: Callable[..., Bench], status: int, code: str, temporary: bool
) -> None:
    one = bench()
    one.wire.handlers.append(failing("UploadPart", 1000, status, code))
    with pytest.raises(StoreError, match="part") as caught:
        one.store.put_buffer("data", DATA, crc64nvme=CHECKSUM)
    assert caught.value.temporary is temporary
    assert nothing_is_left(one.store)


def losing_the_answer(operation: str, number: int = 1) -> Handler:
    """Such a request, the first or another, takes effect, and the client hears of a server's error."""
    session, left = URLLib3Session(), [number]

    def lose(name: str, request: Any) -> AWSResponse | None:
        if name != operation:
            return None
        left[0] -= 1
        if left[0]:
            return None
        assert session.send(request).status_code == 200
        return answer(500, "InternalError")

    return lose


@pytest.mark.parametrize(("data", "operation"), [(SMALL, "PutObject"), (DATA, "CompleteMultipartUpload")])
def test_an_answer_that_was_lost_is_no_failure(bench: Callable[..., Bench], data: bytes, operation: str) -> None:
    one = bench()
    assert one.store.verifies_uploads()
    one.wire.handlers.append(losing_the_answer(operation))
    one.store.put_buffer("data", data, crc64nvme=crc64nvme(data))
    assert one.store.head("data").crc64nvme == crc64nvme(data)
    assert one.store.unfinished() == ()


@pytest.mark.parametrize("number", [1, 3, 4], ids=["once", "latest", "latest under its etag"])
def test_the_probe_passes_where_an_answer_was_lost(bench: Callable[..., Bench], number: int) -> None:
    one = bench()
    one.store.verifies_uploads()
    one.wire.handlers.append(losing_the_answer("PutObject", number))
    assert probe(one.store) == ()
    assert nothing_is_left(one.store)


def test_an_upload_that_was_removed_under_way_may_be_tried_again(bench: Callable[..., Bench]) -> None:
    """The garbage collector took it for an abandoned one."""
    one = bench()

    def collect(operation: str, _: Any) -> None:
        if operation == "CompleteMultipartUpload":
            one.wire.handlers.clear()
            (upload,) = other.unfinished()
            assert upload.key == "data"
            for _ in range(2):  # gone is as good as removed
                other.abort(upload)

    other = S3Store(one.store._bucket, one.store._prefix, one.spec.model_copy(update={"upload_bandwidth": "9Ti"}))
    one.wire.handlers.append(collect)
    with pytest.raises(StoreError, match="removed under way") as caught:
        one.store.put_buffer("data", DATA, crc64nvme=CHECKSUM)
    assert caught.value.temporary
    one.store.put_buffer("data", DATA, crc64nvme=CHECKSUM)
    assert one.store.head("data").crc64nvme == CHECKSUM


def unknowing(operation: str, request: Any) -> None:
    """As a server that ignores what it does not know."""
    for name in list(request.headers):
        if name.lower().startswith("x-amz-checksum-") and "sha256" not in name.lower():
            del request.headers[name]


def refusing(operation: str, request: Any) -> AWSResponse | None:
    """As a server that refuses what it does not know."""
    known = not any("crc64nvme" in name.lower() for name in request.headers)
    return None if known else answer(400, "InvalidArgument")


def trusting(operation: str, request: Any) -> AWSResponse | None:
    """As a server that takes any checksum."""
    if operation == "PutObject" and "crc64nvme" in " ".join(request.headers).lower():
        return AWSResponse("", 200, {}, Body(b""))
    if operation == "HeadObject":
        return AWSResponse(
            "", 200, {"x-amz-checksum-crc64nvme": s3knows.to_header(crc64nvme(s3knows._DATA))}, Body(b"")
        )
    return None


@pytest.mark.parametrize("server", [unknowing, refusing, trusting])
def test_a_server_without_the_checksum_is_told_from_one_that_has_it(bench: Callable[..., Bench], server: Any) -> None:
    one = bench()
    (one.wire.altering if server is unknowing else one.wire.handlers).append(server)
    assert not one.store.verifies_uploads()
    one.wire.handlers.clear()
    (sentence,) = probe(one.store)
    assert "read back" in sentence
    assert nothing_is_left(one.store)


@SIZES
def test_where_the_server_does_not_verify_the_object_is_read_back(bench: Callable[..., Bench], data: bytes) -> None:
    one = bench()
    one.wire.altering.append(unknowing)
    for _ in range(2):
        one.store.put_buffer("data", data, crc64nvme=crc64nvme(data))
    assert one.wire.requests("GetObject")
    one.wire.handlers.append(damaging({"PutObject", "UploadPart"}, 1))
    with pytest.raises(StoreError, match="read back") as caught:
        one.store.put_buffer("other", data, crc64nvme=crc64nvme(data))
    assert caught.value.temporary
    assert [entry.key for entry in one.store.list()] == ["data"]
    one.store.put_buffer("other", data, crc64nvme=crc64nvme(data))


def test_an_answer_that_is_longer_than_the_range_is_refused(bench: Callable[..., Bench]) -> None:
    one = bench()
    one.store.put_buffer("data", SMALL, crc64nvme=crc64nvme(SMALL))

    def whole(operation: str, request: Any) -> None:
        if operation == "GetObject":
            del request.headers["Range"]

    one.wire.altering.append(whole)
    with pytest.raises(StoreError, match="ranges"):
        one.store.get_into("data", 10, memoryview(bytearray(100)))


def test_all_uploads_share_the_bandwidth(bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    rate = 1 << 20
    monkeypatch.setitem(pacing._shared, rate, pacing.Bandwidth(rate, clock=lambda: 0.0, sleep=waits.append))
    one = bench(upload_bandwidth="1Mi")
    one.store.put_buffer("large", DATA, crc64nvme=CHECKSUM)
    one.store.put_buffer("small", SMALL, crc64nvme=crc64nvme(SMALL))
    # On a clock that stands still each piece waits for all before it, those of the other object too.
    assert max(waits) == pytest.approx(len(DATA) / rate)


def test_large_objects_keep_within_the_limit_of_parts() -> None:
    for size in (1, 100 << 30, 5 << 40):
        part = s3parts.part_size(size)
        assert part >= s3parts.PART
        assert -(-size // part) <= 10_000
