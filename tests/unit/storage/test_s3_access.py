"""Where credentials come from, how a server is addressed, and that no secret is ever told."""

from __future__ import annotations

import json
import logging
import secrets
import traceback
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import boto3
import pytest
from botocore.awsrequest import AWSResponse
from botocore.httpsession import URLLib3Session

from lockstep_api.v1alpha1 import S3Spec
from lockstep_trainer.errors import StoreError
from lockstep_trainer.storage import s3client
from lockstep_trainer.storage.checksum import crc64nvme
from lockstep_trainer.storage.s3 import S3Store
from lockstep_trainer.storage.s3client import client_of

_SOURCES = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_PROFILE",
    "AWS_ROLE_ARN",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
)


class Text:
    """The body of an answer."""

    def __init__(self, text: str = "") -> None:
        self._text = text

    def stream(self, **_: Any) -> Iterator[bytes]:
        yield self._text.encode()


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """A process that knows of no credentials."""
    for name in _SOURCES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setattr(s3client, "_clients", {})
    return monkeypatch


def source(monkeypatch: pytest.MonkeyPatch) -> str | None:
    """The provider that a new client's credentials come from."""
    monkeypatch.setattr(s3client, "_clients", {})
    credentials = client_of(S3Spec())._request_signer._credentials  # type: ignore[attr-defined]
    return None if credentials is None else str(credentials.method)


def test_credentials_are_those_that_boto3_finds_explicit_ones_first(bare: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert source(bare) is None
    (tmp_path / "credentials").write_text("[default]\naws_access_key_id = a\naws_secret_access_key = b\n")
    assert source(bare) == "shared-credentials-file"
    (tmp_path / "token").write_text("token")
    bare.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(tmp_path / "token"))
    bare.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/trainer")
    assert source(bare) == "assume-role-with-web-identity"
    bare.setenv("AWS_ACCESS_KEY_ID", "of-the-secret")
    bare.setenv("AWS_SECRET_ACCESS_KEY", "c")
    assert source(bare) == "env"


def test_the_identity_of_the_instance_is_asked_last(bare: pytest.MonkeyPatch) -> None:
    client_of(S3Spec())
    chain = boto3.session.Session()._session.get_component("credential_provider")
    methods = [provider.METHOD for provider in chain.providers]
    assert methods[0] == "env"
    assert methods[-2:] == ["container-role", "iam-role"]


def test_without_credentials_a_sentence_names_both_ways(bare: pytest.MonkeyPatch) -> None:
    store = S3Store("bucket", "prefix", S3Spec(endpoint="http://127.0.0.1:9", path_style=True))
    reads: tuple[Callable[[], object], ...] = (lambda: store.get("x"), lambda: store.head("x"), store.list)
    for read in reads:
        with pytest.raises(StoreError, match=r"secretRef, or give the pods an identity") as caught:
            read()
        assert not caught.value.temporary


def test_credentials_that_come_later_are_found(bare: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The instance's metadata service did not answer the first call of the process."""
    assert client_of(S3Spec())._request_signer._credentials is None  # type: ignore[attr-defined]
    (tmp_path / "credentials").write_text("[default]\naws_access_key_id = a\naws_secret_access_key = b\n")
    client = client_of(S3Spec())
    assert client._request_signer._credentials.method == "shared-credentials-file"  # type: ignore[attr-defined]
    assert client_of(S3Spec()) is client


def test_a_metadata_service_that_is_busy_is_asked_again(bare: pytest.MonkeyPatch) -> None:
    bare.setenv("AWS_EC2_METADATA_DISABLED", "false")
    asked: list[str] = []
    later = datetime.now(UTC) + timedelta(hours=6)
    role = {"AccessKeyId": "a", "SecretAccessKey": "b", "Token": "c", "Expiration": later.isoformat()}

    def send(_: object, request: Any) -> AWSResponse:
        asked.append(request.url)
        if asked.count(request.url) < 3:
            return AWSResponse(request.url, 503, {}, Text("busy"))
        text = "role" if request.url.endswith("security-credentials/") else json.dumps(role)
        return AWSResponse(request.url, 200, {}, Text(text))

    bare.setattr(URLLib3Session, "send", send)
    assert source(bare) == "iam-role"
    assert {asked.count(url) for url in asked} == {3}


@pytest.mark.parametrize(
    ("spec", "url"),
    [
        ({"endpoint": "https://s3.example:9000", "path_style": True}, "https://s3.example:9000/bucket/key"),
        ({"endpoint": "https://s3.example:9000"}, "https://s3.example:9000/bucket/key"),
        ({"region": "eu-central-1"}, "https://bucket.s3.eu-central-1.amazonaws.com/key"),
        ({"region": "eu-central-1", "path_style": True}, "https://s3.eu-central-1.amazonaws.com/bucket/key"),
    ],
)
def test_a_server_is_addressed_as_the_resource_says(
    bare: pytest.MonkeyPatch, spec: dict[str, object], url: str
) -> None:
    bare.setenv("AWS_ACCESS_KEY_ID", "a")
    bare.setenv("AWS_SECRET_ACCESS_KEY", "b")
    client = client_of(S3Spec.model_validate(spec))
    asked: list[str] = []

    def answer(request: Any, **_: Any) -> AWSResponse:
        asked.append(request.url)
        headers: Any = {"Content-Length": "0", "Last-Modified": "Wed, 25 Nov 2026 10:00:00 GMT"}
        return AWSResponse(request.url, 200, headers, Text())

    client.meta.events.register("before-send.s3", answer)
    S3Store("bucket", "", S3Spec.model_validate(spec)).head("key")
    assert asked == [url]


@pytest.mark.parametrize("with_token", [False, True])
def test_no_secret_is_told_by_a_log_or_an_error(
    with_token: bool, s3_endpoint: str, bare: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    secret, token = secrets.token_hex(20), secrets.token_hex(20)
    bare.setenv("AWS_ACCESS_KEY_ID", "test")
    bare.setenv("AWS_SECRET_ACCESS_KEY", secret)
    if with_token:
        bare.setenv("AWS_SESSION_TOKEN", token)
    store = S3Store("lockstep-test", uuid4().hex, S3Spec(endpoint=s3_endpoint, path_style=True))
    caplog.set_level(logging.INFO)
    caplog.set_level(logging.DEBUG, "lockstep_trainer")
    told = [repr(store)]
    calls: tuple[Callable[[], object], ...] = (
        lambda: store.put("x", b"1", only_if_absent=True),
        lambda: store.put_buffer("x", b"1", crc64nvme=crc64nvme(b"1")),
        lambda: store.get("x"),
        lambda: store.get_into("x", 0, memoryview(bytearray(4))),
        lambda: store.head("x"),
        store.list,
        store.unfinished,
        lambda: store.delete("x"),
    )
    for call in calls:
        with pytest.raises(StoreError) as caught:
            call()
        if not with_token:
            assert "check the credentials" in str(caught.value)
        told += [repr(caught.value), "".join(traceback.format_exception(caught.value))]
    text = "\n".join([*told, caplog.text])
    assert secret not in text
    assert token not in text
