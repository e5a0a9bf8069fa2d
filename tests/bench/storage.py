"""Which client moves checkpoints best: boto3 in our threads, awscrt's S3 client, or s3torchconnector.

    PYTHONPATH=tests .venv/bin/python tests/bench/storage.py [--megabytes 512] [--rounds 3] [--python OTHER/bin/python]

Each uploads one piece of memory to the local S3 server (versitygw, on a disk of this machine) in parts of 16 MiB with
CRC64NVME checksums where it can, and reads it back into memory that is there already. Rounds alternate, so that all see
the same machine; the best of the rounds stands for each, since others may be using it. Each run is a process of its
own: its CPU seconds are all that the client took, in every thread. s3torchconnector is no dependency of Lockstep:
--python names an interpreter that has it beside Lockstep's packages; without it that part is left out. The result is
added to docs/results/storage.json.
"""

from __future__ import annotations

import argparse
import functools
import json
import mmap
import os
import platform
import resource
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "docs/results/storage.json"
BUCKET, REGION, PART = "lockstep-test", "us-east-1", 16 << 20

Transfer = Callable[[], None]


def memory(size: int) -> memoryview:
    """Memory whose pages are all there."""
    view = memoryview(mmap.mmap(-1, size))
    step = 1 << 20
    for start in range(0, size, step):
        view[start : start + step] = bytes(min(step, size - start))
    return view


def with_boto3(endpoint: str, key: str, source: memoryview, target: memoryview) -> tuple[Transfer, Transfer]:
    """Lockstep's own store, checksums of the parts and of the whole included."""
    from lockstep_api.v1alpha1 import S3Spec
    from lockstep_trainer.storage import open_store
    from lockstep_trainer.storage.checksum import crc64nvme

    store = open_store(f"s3://{BUCKET}", S3Spec(endpoint=endpoint, region=REGION, path_style=True))
    store.verifies_uploads()
    checksum = crc64nvme(source)  # staging makes it

    def down() -> None:
        store.get_into(key, 0, target)

    return lambda: store.put_buffer(key, source, crc64nvme=checksum), down


def with_awscrt(endpoint: str, key: str, source: memoryview, target: memoryview) -> tuple[Transfer, Transfer]:
    """The client in C, which cuts into parts by itself; it reads and fills memory of Python's through callbacks."""
    from awscrt import auth, http, io, s3

    class Stream:
        def __init__(self) -> None:
            self.at = 0

        def read(self, size: int) -> bytes:
            piece = bytes(source[self.at : self.at + size])
            self.at += len(piece)
            return piece

        def readinto(self, buffer: memoryview) -> int:
            count = min(len(buffer), len(source) - self.at)
            buffer[:count] = source[self.at : self.at + count]
            self.at += count
            return count

        def seek(self, offset: int, whence: int = 0) -> int:
            self.at = offset + (0, self.at, len(source))[whence]
            return self.at

        def tell(self) -> int:
            return self.at

    loops = io.EventLoopGroup()
    credentials = auth.AwsCredentialsProvider.new_static(
        os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"]
    )
    client = s3.S3Client(
        bootstrap=io.ClientBootstrap(loops, io.DefaultHostResolver(loops)),
        region=REGION,
        signing_config=s3.create_default_s3_signing_config(region=REGION, credential_provider=credentials),
        part_size=PART,
        tls_mode=s3.S3RequestTlsMode.DISABLED,
    )
    host = endpoint.removeprefix("http://")

    def up() -> None:
        headers = http.HttpHeaders([("host", host), ("content-length", str(len(source))), ("if-none-match", "*")])
        checksums = s3.S3ChecksumConfig(
            algorithm=s3.S3ChecksumAlgorithm.CRC64NVME, location=s3.S3ChecksumLocation.HEADER
        )
        client.make_request(
            type=s3.S3RequestType.PUT_OBJECT,
            request=http.HttpRequest("PUT", f"/{BUCKET}/{key}", headers, Stream()),
            checksum_config=checksums,
        ).finished_future.result()

    def down() -> None:
        def take(chunk: bytes, offset: int, **_: Any) -> None:
            target[offset : offset + len(chunk)] = chunk

        client.make_request(
            type=s3.S3RequestType.GET_OBJECT,
            request=http.HttpRequest("GET", f"/{BUCKET}/{key}", http.HttpHeaders([("host", host)])),
            on_body=take,
        ).finished_future.result()

    return up, down


def with_s3torchconnector(endpoint: str, key: str, source: memoryview, target: memoryview) -> tuple[Transfer, Transfer]:
    """Its client, which writes and reads one stream."""
    from s3torchconnector import S3ClientConfig
    from s3torchconnector._s3client import S3Client

    config = S3ClientConfig(force_path_style=True, part_size=PART)
    client = S3Client(REGION, endpoint=endpoint, s3client_config=config)
    piece = 4 << 20

    def up() -> None:
        writer = client.put_object(BUCKET, key)
        for start in range(0, len(source), piece):
            writer.write(bytes(source[start : start + piece]))  # it takes nothing but bytes
        writer.close()

    def down() -> None:
        reader, at = client.get_object(BUCKET, key), 0
        while count := reader.readinto(target[at : at + piece]):
            at += count

    return up, down


CLIENTS: dict[str, tuple[str, Callable[..., tuple[Transfer, Transfer]]]] = {
    "boto3": ("boto3", with_boto3),
    "awscrt": ("awscrt", with_awscrt),
    "s3torchconnector": ("s3torchconnector", with_s3torchconnector),
}


def cpu_seconds() -> float:
    """Of this process so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def one(name: str, endpoint: str, size: int) -> None:
    """In a process of its own: both ways once; prints the numbers, or ``null`` where the client is not there."""
    package, make = CLIENTS[name]
    try:
        result: dict[str, Any] = {"version": version(package)}
    except PackageNotFoundError:
        print("null")
        return
    source, target = memory(size), memory(size)
    for start in range(0, size, 1 << 20):
        source[start : start + 16] = secrets.token_bytes(16)
    up, down = make(endpoint, f"{name}-{os.getpid()}", source, target)
    for way, transfer in (("up", up), ("down", down)):
        begun, cpu = time.perf_counter(), cpu_seconds()
        transfer()
        result[f"{way}_mb_per_s"] = round(size / (time.perf_counter() - begun) / 1e6, 1)
        result[f"{way}_cpu_s"] = round(cpu_seconds() - cpu, 3)
    if source != target:
        raise SystemExit(f"{name} returned other bytes than it was given")
    print(json.dumps(result))


def measure(size: int, rounds: int, other: str) -> dict[str, Any]:
    """The best of the rounds of each client that is there."""
    from s3server import S3Server  # not above: another client's Python has none of its dependencies

    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in CLIENTS}
    for _ in range(rounds):
        for name in CLIENTS:
            with tempfile.TemporaryDirectory() as folder, S3Server(Path(folder)) as server:
                python = other if name == "s3torchconnector" else sys.executable
                command = [python, __file__, "--one", name, server.endpoint, "--megabytes", str(size // 1_000_000)]
                environment = {**os.environ, **server.credentials, "AWS_EC2_METADATA_DISABLED": "true"}
                answer = json.loads(subprocess.run(command, env=environment, check=True, stdout=-1).stdout)
            if answer is not None:
                runs[name].append(answer)
                print(name, answer, flush=True)
    return {name: functools.reduce(better, each) for name, each in runs.items() if each}


def better(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """The better number of each: rates up, CPU time down."""
    return {key: a[key] if key == "version" else (min if key.endswith("cpu_s") else max)(a[key], b[key]) for key in a}


def main() -> None:
    """Measure and add to the results."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--megabytes", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--one", nargs=2, metavar=("CLIENT", "ENDPOINT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    size = arguments.megabytes * 1_000_000
    if arguments.one:
        one(arguments.one[0], arguments.one[1], size)
        return
    entry = {
        "what": "one object of this size up to the local S3 server and down again: best of the rounds",
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=REPOSITORY, text=True).strip(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, load {os.getloadavg()[0]:.0f}",
        "megabytes": arguments.megabytes,
        "rounds": arguments.rounds,
        "clients": measure(size, arguments.rounds, arguments.python),
    }
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    RESULTS.write_text(json.dumps([*known, entry], indent=1) + "\n")
    print(json.dumps(entry, indent=1))


if __name__ == "__main__":
    main()
