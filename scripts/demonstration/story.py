"""The demonstration, from an empty machine to a trained model: set-up, training through two faults, proof."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from rich.text import Text

from checker.check import Verdict, check
from checker.stores import BucketObjects
from demonstration import faults, install
from demonstration.console import Story
from demonstration.target import REPOSITORY, DemoError, Target
from demonstration.watch import watch
from localcluster import Cluster, ClusterError
from lockstep_api.v1alpha1 import TrainingJob
from lockstep_cli import explain, journal, manifest, statustable
from lockstep_cli.commands import report

NAMESPACE = "lockstep-demo"
BUCKET = "lockstep-demo"
MANIFEST = REPOSITORY / "examples/demo.yaml"
REPORT = REPOSITORY / "report/demo.html"
NATS_BETTER = 0.3
"""How much the model must beat a tuned bigram model by, in nats per token."""
FIRST_STEP_SECONDS, JOB_SECONDS = 180.0, 600.0


def main() -> int:
    """Command line; 0 when everything was shown."""
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--keep", action="store_true", help="leave the local cluster up at the end")
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="override a field of the job")
    parser.add_argument("--file", type=Path, default=MANIFEST, help="the job (default: examples/demo.yaml)")
    parser.add_argument("--report", type=Path, default=REPORT, help="where the report goes")
    arguments = parser.parse_args()
    story = Story()
    demonstration = Demonstration(story, arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # it cleans up as on Ctrl-C
    try:
        demonstration.run()
    except (DemoError, ClusterError) as error:
        story.console.print(Text.assemble("\n", ("demo:", "red"), f" {error}"), soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        story.console.print("\nstopped", style="yellow")
        return 130
    finally:
        demonstration.clean_up()
    return 0


class Demonstration:
    """The chapters, in order."""

    def __init__(self, story: Story, arguments: argparse.Namespace) -> None:
        self.story = story
        self.arguments = arguments
        self.target: Target | None = None
        self.was_up = False

    def run(self) -> None:
        """All of it; raises DemoError or ClusterError where it can't go on."""
        target = self.set_up()
        ready = time.monotonic()
        job = self.train(target)
        self.prove(target, job)
        shown = (f"shown in {time.monotonic() - ready:.0f} s", "bold")
        self.story.say(Text.assemble(shown, f" after set-up; report: {self.arguments.report}"))

    def set_up(self) -> Target:
        """A cluster with Lockstep in it."""
        story = self.story
        story.chapter("Set-up")
        if os.environ.get("LOCKSTEP_DEMO_CLUSTER") == "existing":
            target = self.target = Target.existing()
            story.say("using the cluster of $KUBECONFIG; its nodes keep their power: a pod is deleted by force instead")
        else:
            self.was_up = Cluster().healthy()
            with story.step("three Kubernetes nodes of 2 stand-in GPUs each"):
                target = self.target = Target.local(Cluster.up(nodes=3, gpus=2, say=story.progress))
            with story.step("images of operator and trainer, from images/"):
                files = install.build_images(target)
            with story.step("images onto the nodes"):
                install.load_images(target, files)
        with story.step("helm install charts/lockstep"):
            install.helm_install(target)
        with story.step("a namespace, a bucket on the S3 server, a Secret with its keys"):
            install.prepare_namespace(target, NAMESPACE, BUCKET)
        return target

    def train(self, target: Target) -> TrainingJob:
        """Applies the job, breaks things twice, waits for its end."""
        story = self.story
        document = self.manifest(target)
        name = document["metadata"]["name"]
        story.chapter(f"Training: kubectl apply -f {os.path.relpath(self.arguments.file)}")
        target.kubectl("delete", "trainingjob", name, "-n", NAMESPACE, "--ignore-not-found", "--wait=true")
        target.apply(document)
        steps, every = document["spec"]["trainer"]["recipe"]["steps"], document["spec"]["checkpoint"]["every"]
        # Between two checkpoints, so that there are steps to be done again.
        first, second = (round(part * steps / 3 / every) * every + every // 2 for part in (1, 2))
        with watch(target, NAMESPACE, name) as job:
            with story.step("pods scheduled, workers started, first step"):
                job.until(lambda j: j.status.progress.step >= 1, FIRST_STEP_SECONDS, "the first step", self._progress)
            with story.step(f"training to step {first}"):
                job.until(
                    lambda j: j.status.progress.step >= first, JOB_SECONDS, "a third of the steps", self._progress
                )
            victim = faults.pods(target, NAMESPACE, name)[0]["metadata"]["name"]
            told = faults.kill_worker(target, NAMESPACE, victim)
            story.say(Text.assemble(("kill -9", "red"), f" of the worker of rank {told['rank']} in pod {victim}"))
            with story.step(f"the job mends itself and trains to step {second}"):
                job.until(
                    lambda j: j.status.progress.step >= second and j.status.restarts.total >= 1,
                    JOB_SECONDS, "two thirds of the steps", self._progress,
                )  # fmt: skip
            operator = install.operator_node(target)
            pod = faults.pod_away_from(target, NAMESPACE, name, operator)
            node = pod["spec"]["nodeName"]
            victim = pod["metadata"]["name"]
            if target.cluster:
                faults.cut_node(target, node)
                where = f" of {node} under pod {victim} (the operator is on {operator})"
                story.say(Text.assemble(("power cut", "red"), where))
            else:
                faults.lose_pod(target, NAMESPACE, victim)
                story.say(Text.assemble(("deleted by force", "red"), f": pod {victim} on {node}"))
            with story.step("the job mends itself and trains to its end"):
                return job.until(lambda j: j.status.phase == "Succeeded", JOB_SECONDS, "its end", self._progress)

    def manifest(self, target: Target) -> dict[str, Any]:
        """The example, with where S3 is in this cluster, and what the command line changes."""
        settings = [
            f"checkpoint.uri=s3://{BUCKET}/runs",
            f"checkpoint.s3.endpoint={target.s3.endpoint_pods}",
            "checkpoint.s3.pathStyle=true",
            f"checkpoint.s3.secretRef.name={install.SECRET}",
            *self.arguments.set,
        ]
        document = manifest.override(manifest.read(str(self.arguments.file)), settings)
        document["metadata"]["namespace"] = NAMESPACE
        manifest.parse(document, str(self.arguments.file))
        return document

    def prove(self, target: Target, job: TrainingJob) -> None:
        """Exact samples, a loss that beats the bigram model, text, a report."""
        story = self.story
        story.chapter("Proof")
        os.environ.update(AWS_ACCESS_KEY_ID=target.s3.access_key, AWS_SECRET_ACCESS_KEY=target.s3.secret_key)
        uri = f"s3://{BUCKET}/runs/{NAMESPACE}/{job.name}/{job.uid}"
        steps = job.spec.trainer.recipe.steps if job.spec.trainer else None
        with story.step("every sample once, as derived by a checker that shares no code with the trainer"):
            verdict = check(BucketObjects(uri, target.s3.endpoint_host), steps=steps)
        story.say(str(verdict))
        with story.step("the report"):
            told = self.write_report(target, job, uri)
        self._losses(told)
        if told.texts:
            text = told.texts[-1]
            story.say("it writes:")
            story.console.print(text.prompt + text.text.removeprefix(text.prompt), style="italic")
        story.chapter("kubectl get trainingjob")
        story.console.print(target.kubectl("get", "trainingjob", "-n", NAMESPACE).rstrip())
        story.say(Text.assemble(("lockstep why:", "dim"), f" {explain.why(job, time.time())}"))
        self._judge(job, told, verdict)

    def write_report(self, target: Target, job: TrainingJob, uri: str) -> journal.Journal:
        """The HTML report, from the journal on the S3 server."""
        assert job.spec.checkpoint is not None
        here = job.spec.checkpoint.s3.model_copy(update={"endpoint": target.s3.endpoint_host, "path_style": True})
        self.arguments.report.parent.mkdir(parents=True, exist_ok=True)
        return report.write(self.arguments.report, uri, here, job).told

    def _losses(self, told: journal.Journal) -> None:
        last = told.evaluations[-1] if told.evaluations else None
        if last and last.bigram_loss is not None:
            bigram = f"{last.bigram_loss:.3f}: {last.bigram_loss - last.loss:.2f} better"
            self.story.say(
                Text.assemble(
                    "loss on unseen files ",
                    (f"{last.loss:.3f}", "bold"),
                    f" nats per token; a tuned interpolated bigram model of the same tokens has {bigram}",
                )
            )

    def _judge(self, job: TrainingJob, told: journal.Journal, verdict: Verdict) -> None:
        """Raises DemoError for anything that was promised and is not so."""
        last = told.evaluations[-1] if told.evaluations else None
        missing = [
            *([] if verdict.exact else ["samples were lost or repeated"]),
            *([] if len(job.status.faults) >= 2 else [f"{len(job.status.faults)} faults in the status, not 2"]),
            *([] if told.texts else ["no sample of text in the journal"]),
        ]
        if last is None or last.bigram_loss is None:
            missing.append("no bigram loss in the journal")
        elif last.bigram_loss - last.loss < NATS_BETTER:
            missing.append(f"the bigram model is beaten by {last.bigram_loss - last.loss:.2f} nats, not {NATS_BETTER}")
        if missing:
            raise DemoError("not as promised: " + "; ".join(missing))

    def _progress(self, job: TrainingJob) -> None:
        phase = job.status.phase.value if job.status.phase else "Pending"
        self.story.progress(f"{phase}  {statustable.progress_line(job.status)}")

    def clean_up(self) -> None:
        """Takes down what was brought up; in somebody else's cluster, only the job's namespace."""
        if self.target is None or self.arguments.keep:
            return
        with self.story.step("cleaning up"):
            if self.target.cluster is not None and not self.was_up:
                self.target.cluster.down()
            else:
                self.target.kubectl("delete", "namespace", NAMESPACE, "--ignore-not-found", "--wait=false")


if __name__ == "__main__":
    sys.exit(main())
