"""Queries and alerts by Prometheus' own tools: every query parses, and alerts fire when they should and only then."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from localcluster import debian
from localcluster.processes import ClusterError

REPOSITORY = Path(__file__).resolve().parents[3]
FILES = REPOSITORY / "charts/lockstep/files"
VARIABLES = {"$namespace": "team-a", "$job": "web", "$__range": "1h", "$__rate_interval": "1m"}

Promtool = Callable[..., None]


@pytest.fixture(scope="session")
def promtool(tmp_path_factory: pytest.TempPathFactory) -> Promtool:
    """Runs promtool, of the Prometheus that the local cluster uses, on a document; fails the test with what it says."""
    try:
        program = debian.prometheus().with_name("promtool")
    except (ClusterError, OSError) as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"no Prometheus on PATH, and Debian's can't be had: {error}")

    def run(*command: str, document: dict[str, Any]) -> None:
        file = tmp_path_factory.mktemp("promtool") / "document.yaml"
        file.write_text(yaml.safe_dump(document))
        done = subprocess.run([program, *command, file], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    return run


@pytest.mark.parametrize("path", sorted((FILES / "dashboards").glob("*.json")), ids=lambda path: path.stem)
def test_every_query_of_a_dashboard_parses(promtool: Promtool, path: Path) -> None:
    dashboard = json.loads(path.read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    queries += [annotation["expr"] for annotation in dashboard["annotations"]["list"]]
    rules = []
    for number, query in enumerate(queries):
        filled = re.sub(r"\$\w+", lambda match: VARIABLES[match[0]], query)
        rules.append({"record": f"query:{number}", "expr": filled})
    promtool("check", "rules", document={"groups": [{"name": "dashboard", "rules": rules}]})


TWO_JOBS = {
    'lockstep_job_phase{namespace="a",job_name="x",phase="Running",pod="op"}': "1x60",
    'lockstep_job_phase{namespace="b",job_name="y",phase="Running",pod="op"}': "1x60",
    'lockstep_job_phase{namespace="b",job_name="z",phase="Running",pod="op"}': "0x60",
    'lockstep_job_gpus{namespace="a",job_name="x",pod="op"}': "16x60",
    'lockstep_job_gpus{namespace="b",job_name="y",pod="op"}': "8x60",
    'lockstep_job_gpus{namespace="b",job_name="z",pod="op"}': "64x60",
    'lockstep_job_goodput_ratio{namespace="a",job_name="x",pod="op"}': "0.97x60",
    'lockstep_job_goodput_ratio{namespace="b",job_name="y",pod="op"}': "0.75x60",
    'lockstep_job_goodput_ratio{namespace="b",job_name="z",pod="op"}': "0.1x60",
    'lockstep_job_ledger_gpu_seconds{namespace="a",job_name="x",class="productive",pod="op"}': "0+60x60",
    'lockstep_job_ledger_gpu_seconds{namespace="b",job_name="y",class="productive",pod="op"}': "0+30x60",
    'lockstep_job_ledger_gpu_seconds{namespace="b",job_name="y",class="starting",pod="op"}': "0+10x60",
    'lockstep_job_restarts{namespace="a",job_name="x",rung="pod",pod="op"}': "0x60",
    'lockstep_job_restarts{namespace="b",job_name="y",rung="pod",pod="op"}': "1+1x60",
}
"""Two jobs that train and one that has ended, in three series each of one operator; a sample a minute."""


@pytest.mark.parametrize(
    ("panel", "expected"),
    [
        ("Jobs that train", {"": 2}),
        ("GPUs that train", {"": 24}),
        ("Goodput", {"": 0.9}),
        ("GPUs that train, by namespace", {'namespace="a"': 16, 'namespace="b"': 8}),
        ("Where the GPU time went", {'class="productive"': 5400, 'class="starting"': 600}),
        ("Least goodput", {'job_name="y", namespace="b"': 0.75, 'job_name="x", namespace="a"': 0.97}),
        ("Restarts by rung", {'rung="pod"': 60}),
        ("Most restarts", {'job_name="y", namespace="b"': 61}),
        ("Nodes left out", {"": 0}),
    ],
)
def test_the_fleets_panels_add_up_jobs_that_train(promtool: Promtool, panel: str, expected: dict[str, float]) -> None:
    shows(promtool, "fleet", panel, TWO_JOBS, expected)


def test_the_fleets_goodput_counts_what_a_jobs_does(promtool: Promtool) -> None:
    """A job that waited long for its nodes lost no GPU time by it, and of a script no step is known."""
    ledger = "lockstep_job_ledger_gpu_seconds"
    more = {
        f'{ledger}{{namespace="a",job_name="x",class="queued",pod="op"}}': "9000x60",
        f'{ledger}{{namespace="b",job_name="y",class="suspended",pod="op"}}': "9000x60",
        f'{ledger}{{namespace="b",job_name="script",class="unattributed",pod="op"}}': "9000x60",
    }
    shows(promtool, "fleet", "Goodput", TWO_JOBS | more, {"": 0.9})


def test_a_trainer_that_never_made_a_step_lowers_the_fleets_goodput(promtool: Promtool) -> None:
    never = 'lockstep_job_ledger_gpu_seconds{namespace="b",job_name="never",class='
    more = {f'{never}"productive",pod="op"}}': "0x60", f'{never}"starting",pod="op"}}': "1400x60"}
    shows(promtool, "fleet", "Goodput", TWO_JOBS | more, {"": 5400 / 7400})


def test_what_was_added_in_the_range_is_whole_though_another_operator_took_over(promtool: Promtool) -> None:
    ledger = 'lockstep_job_ledger_gpu_seconds{namespace="a",job_name="x",class="productive",pod='
    series = {f'{ledger}"op"}}': "0+60x30 stale", f'{ledger}"next"}}': "_x31 1860+60x29"}
    shows(promtool, "fleet", "Where the GPU time went", series, {'class="productive"': 3600})


def test_faults_before_the_shown_time_are_not_counted(promtool: Promtool) -> None:
    """An hour is shown. The first leader had judged three faults before; the second came within the hour."""
    faults = 'lockstep_faults_total{namespace="team-a",job_name="web",cause='
    series = {
        f'{faults}"Hang",rung="process",pod="a"}}': "2x70 3x20 stale",
        f'{faults}"NodeLost",rung="pod",pod="a"}}': "1x90 stale",
        f'{faults}"NodeLost",rung="pod",pod="b"}}': "_x95 1x9 2x50",
    }
    expected = {'cause="Hang", rung="process"': 1, 'cause="NodeLost", rung="pod"': 2}
    shows(promtool, "job", "Faults by cause", series, expected, at="120m")


def shows(
    promtool: Promtool,
    dashboard: str,
    panel: str,
    series: dict[str, str],
    expected: dict[str, float],
    *,
    at: str = "60m",
) -> None:
    """The panel shows these values of these series, a sample a minute."""
    panels = json.loads((FILES / f"dashboards/{dashboard}.json").read_text())["panels"]
    query = next(one for one in panels if one["title"] == panel)["targets"][0]["expr"]
    values = VARIABLES | ({"$namespace": ".*"} if dashboard == "fleet" else {})
    filled = re.sub(r"\$\w+", lambda match: values[match[0]], query)
    shown = [{"labels": f"{{{labels}}}", "value": value} for labels, value in expected.items()]
    asked = {"expr": filled, "eval_time": at, "exp_samples": shown}
    given = [{"series": name, "values": samples} for name, samples in series.items()]
    document = {
        "evaluation_interval": "1m",
        "tests": [{"interval": "1m", "input_series": given, "promql_expr_test": [asked]}],
    }
    promtool("test", "rules", document=document)


def test_the_rules_are_valid(promtool: Promtool) -> None:
    promtool("check", "rules", document=yaml.safe_load((FILES / "alerts.yaml").read_text()))


JOB = 'namespace="team-a",job_name="web"'
WRONG = "lockstep_corrupt_rank_confidence_ratio"
LEFT = "lockstep_agent_certificate_remaining_ratio"


@pytest.mark.parametrize(
    ("alert", "at", "series", "fires"),
    [
        ("LockstepOperatorNotWorking", "6m", {"lockstep_operator_leading": "0x30"}, True),
        ("LockstepOperatorNotWorking", "6m", {'lockstep_operator_leading{pod="a"}': "0x30",
                                              'lockstep_operator_leading{pod="b"}': "1x30"}, False),
        ("LockstepOperatorNotWorking", "6m", {"up": "1x30"}, True),
        ("LockstepJobStalled", "40m", {f"lockstep_job_step{{{JOB}}}": "7x90",
                                       f'lockstep_job_phase{{{JOB},phase="Running"}}': "1x90"}, True),
        ("LockstepJobStalled", "40m", {f"lockstep_job_step{{{JOB}}}": "7+1x90",
                                       f'lockstep_job_phase{{{JOB},phase="Running"}}': "1x90"}, False),
        ("LockstepJobStalled", "40m", {f"lockstep_job_step{{{JOB}}}": "7x90",
                                       f'lockstep_job_phase{{{JOB},phase="Succeeded"}}': "1x90"}, False),
        ("LockstepJobStalled", "70m", {f"lockstep_job_step{{{JOB}}}": "7x90",
                                       f'lockstep_job_phase{{{JOB},phase="Suspended"}}': "1x60 stale",
                                       f'lockstep_job_phase{{{JOB},phase="Starting"}}': "_x61 1x30"}, False),
        ("LockstepJobStalled", "42m", {f'lockstep_job_step{{{JOB},pod="a"}}': "7+1x39 stale",  # another operator
                                       f'lockstep_job_step{{{JOB},pod="b"}}': "_x40 46x2 47x2 48x9",
                                       f'lockstep_job_phase{{{JOB},phase="Running"}}': "1x90"}, False),
        ("LockstepCheckpointsNotDurable", "15m", {f"lockstep_checkpoint_degraded{{{JOB}}}": "1x30"}, True),
        ("LockstepCheckpointsNotDurable", "15m", {f"lockstep_checkpoint_degraded{{{JOB}}}": "1x5 0x30"}, False),
        ("LockstepCertificateNotRenewed", "90m", {f"{LEFT}{{{JOB}}}": "0.9x99", f'{LEFT}{{{JOB},pod="b"}}': "0.3x99"},
         True),
        ("LockstepCertificateNotRenewed", "90m", {f"{LEFT}{{{JOB}}}": "0.5x99"}, False),
        ("LockstepSlowRank", "30m", {f'lockstep_slow_rank_ratio{{{JOB},rank="3",node="a"}}': "0.3x60"}, True),
        ("LockstepSlowRank", "30m", {f'lockstep_slow_rank_ratio{{{JOB},rank="3",node="a"}}': "0.3x9 _x60"}, False),
        ("LockstepSlowRank", "30m", {f'lockstep_slow_rank_ratio{{{JOB},rank="",node=""}}': "0.3x60"}, False),
        ("LockstepWrongNumbers", "8m", {f'{WRONG}{{{JOB},rank="3"}}': "_x3 0x1 _x60"}, True),  # told once, then left
        ("LockstepWrongNumbers", "40m", {f'{WRONG}{{{JOB},rank="3"}}': "_x3 1x1 _x60"}, False),
        ("LockstepGoodputLow", "70m", {f"lockstep_job_goodput_ratio{{{JOB}}}": "0.5x90",
                                       f'lockstep_job_phase{{{JOB},phase="Running"}}': "1x90"}, True),
        ("LockstepGoodputLow", "70m", {f"lockstep_job_goodput_ratio{{{JOB}}}": "0.97x90",
                                       f'lockstep_job_phase{{{JOB},phase="Running"}}': "1x90"}, False),
    ],
)  # fmt: skip
def test_an_alert_fires_when_it_should(
    promtool: Promtool, tmp_path: Path, *, alert: str, at: str, series: dict[str, str], fires: bool
) -> None:
    """A sample a minute. promtool compares labels and texts too, so the rule is cut down to what is tested here."""
    groups = yaml.safe_load((FILES / "alerts.yaml").read_text())["groups"]
    (rule,) = (rule for group in groups for rule in group["rules"] if rule["alert"] == alert)
    bare = {"alert": alert, "expr": f"count({rule['expr']}) > 0", "for": rule["for"]}
    rules = tmp_path / "rules.yaml"
    rules.write_text(yaml.safe_dump({"groups": [{"name": "one", "rules": [bare]}]}))
    document = {
        "rule_files": [str(rules)],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [{"series": name, "values": values} for name, values in series.items()],
                "alert_rule_test": [{"alertname": alert, "eval_time": at, "exp_alerts": [{}] if fires else []}],
            }
        ],
    }
    promtool("test", "rules", document=document)


@pytest.mark.parametrize(
    ("alert", "at", "series", "labels"),
    [
        ("LockstepJobStalled", "60m", {"lockstep_job_step": "7", 'lockstep_job_phase{phase="Running"}': "1"},
         {"namespace": "team-a", "job_name": "web"}),
        ("LockstepGoodputLow", "70m", {"lockstep_job_goodput_ratio": "0.5", 'lockstep_job_phase{phase="Running"}': "1"},
         {"namespace": "team-a", "job_name": "web"}),
        ("LockstepNodeExcluded", "32m", {'lockstep_node_excluded{node="gpu-17",by="score"}': "1"}, {"node": "gpu-17"}),
    ],
)  # fmt: skip
def test_an_alert_stays_the_same_when_another_operator_takes_over(
    promtool: Promtool, tmp_path: Path, *, alert: str, at: str, series: dict[str, str], labels: dict[str, str]
) -> None:
    """The series of the first end half an hour in: what is told, or waits to be, neither ends nor is told anew."""
    groups = yaml.safe_load((FILES / "alerts.yaml").read_text())["groups"]
    (rule,) = (rule for group in groups for rule in group["rules"] if rule["alert"] == alert)
    rules = tmp_path / "rules.yaml"
    bare = {name: rule[name] for name in ("alert", "expr", "for")}
    rules.write_text(yaml.safe_dump({"groups": [{"name": "one", "rules": [bare]}]}))
    inputs = []
    for name, value in series.items():
        metric, _, own = name.removesuffix("}").partition("{")
        job = "" if "node" in labels else JOB
        for pod, values in (("a", f"{value}x30 stale"), ("b", f"_x31 {value}x90")):
            known = ",".join(filter(None, (own, job, f'pod="{pod}"')))
            inputs.append({"series": f"{metric}{{{known}}}", "values": values})
    told = {"alertname": alert, "eval_time": at, "exp_alerts": [{"exp_labels": labels}]}
    document = {
        "rule_files": [str(rules)],
        "evaluation_interval": "1m",
        "tests": [{"interval": "1m", "input_series": inputs, "alert_rule_test": [told]}],
    }
    promtool("test", "rules", document=document)
