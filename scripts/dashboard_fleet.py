"""Grafana's dashboard of all jobs, of the nodes and of the operator."""

from __future__ import annotations

from grafana import GREEN, YELLOW, Json, Panel, Variable, dashboard, figure, selector

IN_NAMESPACES = 'namespace=~"$namespace"'


def fleet(metric: str, **labels: str) -> str:
    """A selector for the series of the jobs of the chosen namespaces."""
    return selector(metric, IN_NAMESPACES, **labels)


def of_each(metric: str, *labels: str, **selected: str) -> str:
    """A value for each job, and each value of ``labels``, whichever pods serve it."""
    return f"max by ({', '.join(('namespace', 'job_name', *labels))}) ({fleet(metric, **selected)})"


def of_range(metric: str, label: str) -> str:
    """What was added to a metric of jobs in the shown range, by a label, the most first.

    Each operator's pod that led in the range has seen a part of it.
    """
    added = f"max by (namespace, job_name, {label}, pod) (delta({fleet(metric)}[$__range]))"
    return f"sort_desc(sum by ({label}) ({added}) > 0)"


PASSES = "sum by (le) (rate(lockstep_operator_reconcile_seconds_bucket[$__rate_interval]))"
LEDGER = "lockstep_job_ledger_gpu_seconds"
PRODUCTIVE = of_each(LEDGER, **{"class": "productive"})
HELD = selector(LEDGER, IN_NAMESPACES, 'class!~"queued|suspended"')
COUNTED = f"max by (namespace, job_name, class) ({HELD})"
"""As in a job's own goodput."""
RUNS = f"on (namespace, job_name) {of_each('lockstep_job_phase', phase='Running')} == 1"
"""Behind a value for each job: of those that train now."""

FLEET = (
    figure(
        "Jobs that train",
        "Jobs in phase Running.",
        {f"sum({of_each('lockstep_job_phase', phase='Running')}) or vector(0)": "jobs"},
        decimals=0,
    ),
    figure(
        "GPUs that train",
        "Of jobs in phase Running.",
        {f"sum({of_each('lockstep_job_gpus')} and {RUNS}) or vector(0)": "GPUs"},
        decimals=0,
    ),
    figure(
        "Goodput",
        "Productive share of all GPU time that the jobs have held so far; queued and suspended time is left out, and "
        "so are scripts, whose steps nobody knows.",
        {f"sum({PRODUCTIVE}) / sum({COUNTED} and on (namespace, job_name) {PRODUCTIVE})": "goodput"},
        unit="percentunit",
        decimals=1,
        thresholds={0.9: YELLOW, 0.95: GREEN},
    ),
    figure(
        "Jobs in recovery",
        "A fault is being answered.",
        {f"sum({of_each('lockstep_job_phase', phase='Recovering')}) or vector(0)": "jobs"},
        decimals=0,
    ),
    figure(
        "Nodes left out",
        "New pods stay away from them; `lockstep nodes` says why.",
        {"count(max by (node) (lockstep_node_excluded) == 1) or vector(0)": "nodes"},
        decimals=0,
    ),
    figure(
        "Operators that work",
        "1: jobs whose pods are lost get others. 0: they wait.",
        {"sum(lockstep_operator_leading) or vector(0)": "operators"},
        decimals=0,
        thresholds={1.0: GREEN},
    ),
    Panel(
        "Jobs by phase",
        "Those that have not ended.",
        {'sum by (phase) (max by (phase) (lockstep_operator_jobs{phase!~"Succeeded|Failed"}))': "{{phase}}"},
        stacked=True,
        low=0,
        decimals=0,
    ),
    Panel(
        "GPUs that train, by namespace",
        "Of jobs in phase Running.",
        {f"sum by (namespace) ({of_each('lockstep_job_gpus')} and {RUNS})": "{{namespace}}"},
        stacked=True,
        low=0,
        decimals=0,
    ),
    Panel(
        "Where the GPU time went",
        "GPU time of the shown range, by class of the ledger.",
        {of_range(LEDGER, "class"): "{{class}}"},
        kind="bargauge",
        unit="s",
        decimals=0,
    ),
    Panel(
        "Least goodput",
        "The ten jobs in phase Running that lose most; the ledger on the dashboard Lockstep / Job says what to.",
        {f"sort(bottomk(10, {of_each('lockstep_job_goodput_ratio')} and {RUNS}))": "{{namespace}}/{{job_name}}"},
        kind="bargauge",
        unit="percentunit",
        low=0,
        high=1,
        decimals=1,
        thresholds={0.9: YELLOW, 0.95: GREEN},
    ),
    Panel(
        "Restarts by rung",
        "In the shown range, of all jobs: how faults were answered.",
        {of_range("lockstep_job_restarts", "rung"): "{{rung}}"},
        kind="bargauge",
        width=8,
        decimals=0,
    ),
    Panel(
        "Most restarts",
        "Ten jobs, over their life.",
        {
            f"sort_desc(topk(10, sum by (namespace, job_name) ({of_each('lockstep_job_restarts', 'rung')}) > 0))": (
                "{{namespace}}/{{job_name}}"
            )
        },
        kind="bargauge",
        width=8,
        decimals=0,
    ),
    Panel(
        "Checkpoint age",
        "Of jobs in phase Running, the ten oldest newest durable checkpoints.",
        {
            f"topk(10, (time() - {of_each('lockstep_job_checkpoint_timestamp_seconds')}) and {RUNS})": (
                "{{namespace}}/{{job_name}}"
            ),
        },
        unit="s",
        low=0,
        width=8,
    ),
    Panel(
        "Nodes: faults",
        "What speaks against a node: its faults, each halved once a week. The twenty worst.",
        {"sort_desc(topk(20, max by (node) (lockstep_node_score) > 0))": "{{node}}"},
        kind="bargauge",
        width=8,
        low=0,
        decimals=1,
    ),
    Panel(
        "Which nodes are left out",
        "1 while new pods stay away; by its faults' score, or by an administrator.",
        {"max by (node, by) (lockstep_node_excluded) == 1": "{{node}}, {{by}}"},
        width=8,
        low=0,
        high=1,
        decimals=0,
    ),
    Panel(
        "Nodes that jobs wait for",
        "How much longer what is slow takes there than at peers.",
        {f"max by (node, cause) ({fleet('lockstep_slow_rank_ratio')})": "{{cause}} {{node}}"},
        unit="percentunit",
        width=8,
        low=0,
    ),
    Panel(
        "The operator's passes",
        "Time of one pass over a job: the middle one, and what one in a hundred takes.",
        {f"histogram_quantile({share}, {PASSES})": name for share, name in ((0.5, "median"), (0.99, "99 %"))},
        unit="s",
        low=0,
        width=8,
    ),
    Panel(
        "The operator's errors",
        "Passes a second that ended in an error, and are tried again.",
        {"sum by (error) (rate(lockstep_operator_reconcile_errors_total[$__rate_interval]))": "{{error}}"},
        low=0,
        width=8,
    ),
    Panel(
        "Since the API server was heard",
        "Time since the last word on the watch of pods; bookmarks come about once a minute.",
        {"max(lockstep_operator_watch_age_seconds)": "silent"},
        unit="s",
        low=0,
        width=8,
    ),
)


def fleet_dashboard() -> Json:
    """The dashboard of all jobs, the nodes and the operator."""
    return dashboard(
        "lockstep-fleet",
        "Lockstep / Fleet",
        "All training runs: what trains, what it loses and to what, which nodes are at fault, how the operator does.",
        FLEET,
        variables=[Variable("namespace", "Namespace", "label_values(lockstep_job_step, namespace)", all=True)],
    )
