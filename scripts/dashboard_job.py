"""Grafana's dashboard of one job, chosen by the variables ``$namespace`` and ``$job``.

The operator's series span the job's life; an agent's (the leader's) begin anew when another pod leads, so queries of
them take the maximum over pods.
"""

from __future__ import annotations

from grafana import GREEN, RED, YELLOW, Json, Panel, Variable, annotation, dashboard, figure, selector


def of_job(metric: str, **labels: str) -> str:
    """A selector for one job's series."""
    return selector(metric, **{"namespace": "$namespace", "job_name": "$job", **labels})


AGE = f"time() - max({of_job('lockstep_job_checkpoint_timestamp_seconds')})"
FAULTS = of_job("lockstep_faults_total")
LATEST = f"max_over_time({FAULTS}[$__range])"
"""Each leader's count, which begins with its first fault and so can't be asked for its increase."""
LEDGER = f"max by (class) ({of_job('lockstep_job_ledger_gpu_seconds')})"

JOB = (
    figure(
        "Step",
        "Optimizer steps done.",
        {f"max({of_job('lockstep_job_step')})": "step"},
        decimals=0,
    ),
    figure(
        "Loss",
        "Mean training loss of the newest step, in nats per token.",
        {f"max({of_job('lockstep_loss_nats')})": "loss"},
        decimals=3,
    ),
    figure(
        "Goodput",
        "Productive share of GPU time; queued and suspended time is left out.",
        {f"max({of_job('lockstep_job_goodput_ratio')})": "goodput"},
        unit="percentunit",
        decimals=1,
        thresholds={0.9: YELLOW, 0.95: GREEN},
    ),
    figure(
        "Members ready",
        "Share of the members that hold a slot and are connected.",
        {f"max({of_job('lockstep_job_members_ready')}) / max({of_job('lockstep_job_nodes')})": "ready"},
        unit="percentunit",
        decimals=0,
        thresholds={1.0: GREEN},
    ),
    figure(
        "Restarts",
        "Faults answered so far, on all rungs of the ladder.",
        {f"sum(max by (rung) ({of_job('lockstep_job_restarts')}))": "restarts"},
        decimals=0,
    ),
    figure(
        "Checkpoint age",
        "Time since the newest durable checkpoint was committed: what the loss of all nodes would cost.",
        {AGE: "age"},
        unit="s",
        decimals=0,
    ),
    Panel(
        "Loss",
        "In nats per token: training loss of the newest step, and loss on the held-out files.",
        {
            f"max({of_job('lockstep_loss_nats')})": "training",
            f"max({of_job('lockstep_eval_loss_nats')})": "held out",
        },
    ),
    Panel(
        "Throughput",
        "Tokens per second over all GPUs.",
        {f"max({of_job('lockstep_tokens_per_second')})": "tokens/s"},
        low=0,
    ),
    Panel(
        "Step time",
        "Wall time of the newest step.",
        {f"max({of_job('lockstep_step_seconds')})": "step"},
        unit="s",
        low=0,
    ),
    Panel(
        "Where a step's time goes",
        "Seconds of the newest step in each section of the training loop, mean over the workers.",
        {f"max by (section) ({of_job('lockstep_section_seconds')})": "{{section}}"},
        unit="s",
        stacked=True,
        low=0,
    ),
    Panel(
        "Model FLOPs utilisation",
        "FLOPs that the model's formula counts, as a share of the devices' peak. No data where the peak is not known.",
        {f"max({of_job('lockstep_mfu_ratio')})": "MFU"},
        unit="percentunit",
        low=0,
        high=1,
    ),
    Panel(
        "Device memory",
        "Memory in use at most during the newest step, on the rank that used most.",
        {f"max({of_job('lockstep_device_memory_bytes')})": "in use"},
        unit="bytes",
        low=0,
    ),
    Panel(
        "Goodput",
        "Productive share of GPU time since the job's start.",
        {f"max({of_job('lockstep_job_goodput_ratio')})": "goodput"},
        unit="percentunit",
        low=0,
        high=1,
        width=8,
    ),
    Panel(
        "Restarts by rung",
        "How faults were answered: in the process, the container, by a spare, by a new pod.",
        {f"max by (rung) ({of_job('lockstep_job_restarts')})": "{{rung}}"},
        low=0,
        decimals=0,
        width=8,
    ),
    Panel(
        "Checkpoint age",
        "Falls to zero at each commit; a line that only rises means that checkpoints don't become durable.",
        {AGE: "age"},
        unit="s",
        low=0,
        width=8,
    ),
    Panel(
        "Ledger",
        "GPU-seconds since the job's start, each in exactly one class.",
        {LEDGER: "{{class}}"},
        unit="s",
        stacked=True,
        low=0,
        width=16,
        height=9,
    ),
    Panel(
        "Ledger, now",
        "The same, so far.",
        {f"sort_desc({LEDGER} > 0)": "{{class}}"},
        kind="bargauge",
        unit="s",
        width=8,
        height=9,
        decimals=0,
    ),
    Panel(
        "Slow ranks",
        "How much longer what is slow takes than it should, of each rank that the others wait for.",
        {
            f"max by (cause, rank, node) ({of_job('lockstep_slow_rank_ratio')})": "{{cause}}: rank {{rank}} {{node}}",
        },
        unit="percentunit",
        low=0,
        width=8,
    ),
    Panel(
        "Wrong numbers",
        "Of each rank that is suspected: share of its computations that were wrong when it was last looked at.",
        {
            f"max by (kind, rank, node) ({of_job('lockstep_corrupt_rank_confidence_ratio')})": (
                "{{kind}}: rank {{rank}} {{node}}"
            ),
        },
        unit="percentunit",
        low=0,
        high=1,
        width=8,
    ),
    Panel(
        "Steps computed twice",
        "Compared by this leader so far, and dropped since ranks disagreed.",
        {
            f"max({of_job('lockstep_replayed_steps_total')})": "compared",
            f"max({of_job('lockstep_rejected_steps_total')})": "dropped",
        },
        low=0,
        decimals=0,
        width=8,
    ),
    Panel(
        "Faults by cause",
        "Faults judged in the shown time, by cause and by the rung that answered them.",
        {
            f"sum by (cause, rung) ({LATEST} - ({FAULTS} offset $__range or {LATEST} * 0)) > 0": "{{cause}}, {{rung}}",
        },
        kind="bargauge",
        width=24,
        height=6,
        decimals=0,
    ),
)

ANSWERED = f"max by (rung) (delta({of_job('lockstep_job_restarts')}[30s])) > 0"
"""True for half a minute after each restart: one mark, at any scrape interval up to 15 s."""


def job_dashboard() -> Json:
    """The dashboard of one job."""
    return dashboard(
        "lockstep-job",
        "Lockstep / Job",
        "One training run: how it learns, how fast, what broke, and where the GPU time went.",
        JOB,
        variables=(
            Variable("namespace", "Namespace", "label_values(lockstep_job_step, namespace)"),
            Variable("job", "Job", 'label_values(lockstep_job_step{namespace="$namespace"}, job_name)'),
        ),
        annotations=[annotation("Faults", ANSWERED, "answered by: {{rung}}", RED)],
    )
