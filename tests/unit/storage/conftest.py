"""Stores to test: a folder always; an S3 server where LOCKSTEP_TEST_S3_ENDPOINT names one (credentials in AWS_*)."""

from __future__ import annotations

import os
from pathlib import Path
from uuid import uuid4

import pytest

from lockstep_api.v1alpha1 import S3Spec
from lockstep_trainer.storage import ObjectStore, open_store

_ENDPOINT = os.environ.get("LOCKSTEP_TEST_S3_ENDPOINT")
_BUCKET = os.environ.get("LOCKSTEP_TEST_S3_BUCKET", "lockstep-test")


@pytest.fixture(
    params=[
        "folder",
        pytest.param("s3", marks=pytest.mark.skipif(not _ENDPOINT, reason="LOCKSTEP_TEST_S3_ENDPOINT is not set")),
    ]
)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    """An empty store of each kind."""
    if request.param == "folder":
        return open_store(f"file://{tmp_path}/with%20space")
    import boto3

    spec = S3Spec(endpoint=_ENDPOINT, path_style=True)
    client = boto3.client("s3", endpoint_url=_ENDPOINT, region_name=spec.region)
    if _BUCKET not in [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]:
        client.create_bucket(Bucket=_BUCKET)
    return open_store(f"s3://{_BUCKET}/{uuid4().hex}", spec)
