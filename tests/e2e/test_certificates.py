"""Certificates of a job in a cluster: who is let in, and renewal and another master key while it trains."""

from __future__ import annotations

import base64
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from awaited import eventually
from demonstration import install
from demonstration.target import Target
from e2e.jobs import NAMESPACE, POD_SPEC, RunningJob
from lockstep_api import constants
from lockstep_cli.__main__ import main
from lockstep_operator.credentials import Credentials, MasterKeys
from lockstep_operator.plan.renewal import Validity

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

VALID_SECONDS, RENEWAL_SECONDS = 240, 60
"""A certificate is renewed every minute; it takes the kubelet about another to bring it."""
KEY_SECRET = f"{install.RELEASE}-master-key"

ASK = """
import http.client, json, os, ssl, sys, tempfile
order = json.load(sys.stdin)
def ask(path, folder=None, plain=False):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if folder:
        context.load_cert_chain(f"{folder}/tls.crt", f"{folder}/tls.key")
    make = http.client.HTTPConnection if plain else http.client.HTTPSConnection
    connection = make(order["host"], 29400, timeout=10, **({} if plain else {"context": context}))
    try:
        connection.request("GET", path, headers={"X-Lockstep-Token": open("/lockstep/token/token").read()})
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return "refused"
folders = {"own": "/lockstep/token"}
for name, files in order["certificates"].items():
    folders[name] = tempfile.mkdtemp()
    for file, text in files.items():
        open(os.path.join(folders[name], file), "w").write(text)
answers = {name: ask("/v1/inventory", folder) for name, folder in folders.items()}
answers |= {"none": ask("/v1/inventory"), "plain": ask("/v1/inventory", plain=True)}
answers |= {"orders": ask("/v1/operator", folders["own"])}
print(json.dumps(answers))
"""


def set_validity(target: Target, values: dict[str, Any]) -> None:
    install.helm_install(target, {"replicas": 2, **values})


@pytest.fixture(scope="module")
def impatient(lockstep: Target) -> Iterator[Target]:
    """An operator whose certificates live for minutes."""
    set_validity(lockstep, {"tls.certificateSeconds": VALID_SECONDS, "tls.renewalSeconds": RENEWAL_SECONDS})
    yield lockstep
    set_validity(lockstep, {})


@pytest.fixture(scope="module")
def job(impatient: Target) -> Iterator[RunningJob]:
    with RunningJob.training(impatient, "trust", 100_000, every=50) as running:
        running.until_step(5, 300)
        yield running


def master_key(target: Target) -> bytes:
    data = target.get("secret", KEY_SECRET, "-n", install.SYSTEM_NAMESPACE)["data"]
    return base64.b64decode(data["key"])


def expiries(job: RunningJob) -> dict[str, float]:
    """When the certificate ends that each pod's agent uses, by the plain port's metrics."""
    found = {}
    for pod in job.pod_names():
        page = job.kubectl("get", "--raw", f"/api/v1/namespaces/{NAMESPACE}/pods/{pod}:29401/proxy/metrics")
        match = re.search(r"lockstep_agent_certificate_expiry_timestamp_seconds{.*} (\S+)", page)
        assert match, page
        found[pod] = float(match[1])
    return found


def test_only_the_jobs_own_parts_are_let_in(job: RunningJob) -> None:
    """Whoever asks has the token, and stands in a pod of the job."""
    key = master_key(job.target)
    validity = Validity(VALID_SECONDS, RENEWAL_SECONDS)
    made = {
        "another job's": Credentials(MasterKeys(key), validity).secret("another-job"),
        "forged": Credentials(MasterKeys(b"a master key of one's own"), validity).secret(job.job.uid),
    }
    host = job.pods()[0]["status"]["podIP"]
    files = {
        name: {file: text.decode() for file, text in secret.items() if "." in file} for name, secret in made.items()
    }
    order = json.dumps({"host": host, "certificates": files})
    command = (
        "exec",
        "-i",
        "-n",
        NAMESPACE,
        job.pod_names()[1],
        "-c",
        constants.CONTAINER_NAME,
        "--",
        "python3",
        "-c",
        ASK,
    )
    answers = json.loads(job.target.kubectl(*command, stdin=order))
    assert answers == {
        "own": 200,
        "another job's": 403,
        "forged": "refused",
        "none": 403,
        "plain": "refused",
        "orders": 403,  # no pod gives orders in the operator's name
    }


def test_people_reach_it_through_the_api_server(
    job: RunningJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KUBECONFIG", job.target.environment["KUBECONFIG"])
    code = main(["profile", job.name, "--namespace", NAMESPACE, "--ranks", "1", "--output-dir", str(tmp_path)])
    assert code == 0, capsys.readouterr().err
    assert (tmp_path / "trace-r1.json.gz").stat().st_size > 0


def test_a_job_without_tls_is_reached_by_the_same_operator(impatient: Target) -> None:
    """As one that was there before the operator was upgraded."""
    template = {"metadata": {"annotations": {constants.ANNOTATION_TLS: "off"}}, "spec": POD_SPEC}
    with RunningJob.training(impatient, "plain", 20, template=template) as plain:
        plain.until_step(1, 300)
        assert all(pod["metadata"]["annotations"][constants.ANNOTATION_TLS] == "off" for pod in plain.pods())
        plain.until_phase("Succeeded", 300)


@pytest.mark.slow
def test_certificates_are_renewed_under_training(job: RunningJob) -> None:
    first, began = expiries(job), time.time()
    before = job.job.status

    def undisturbed() -> None:
        status = job.until_step(job.job.status.progress.step + 10).status
        assert (status.epoch, status.restarts.total) == (before.epoch, before.restarts.total)

    # Each pod has a certificate that was made later, and the first one has ended.
    eventually(lambda: all(ends > first[pod] for pod, ends in expiries(job).items()), "renewed certificates", 240)
    eventually(lambda: time.time() > max(first.values()), "the first certificates to end", 2 * VALID_SECONDS)
    undisturbed()
    # What starts now comes back with the renewed one.
    job.kill_in(job.pod_names()[1], "lockstep_trainer.agent")
    undisturbed()
    assert "CertificateNotRenewed" not in job.event_reasons()
    lines = [line for line in job.journal("step") if line["at"] > began]
    assert len({(line["epoch"], line["generation"]) for line in lines}) == 1
    steps = [line["step"] for line in lines]
    assert steps == list(range(steps[0], steps[0] + len(steps)))
