"""The parts of a report that are words and tables: key figures, ledger, faults, checkpoints, text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from lockstep_cli.journal import Fault, Journal
from lockstep_cli.report import charts, scale

LEDGER_ORDER = (
    "productive", "starting", "compiling", "data wait", "checkpoint stall", "evaluating", "straggling", "detecting",
    "recovering", "recomputing", "idle spare", "unattributed", "queued", "suspended",
)  # fmt: skip
"""Classes in the order in which they are drawn: useful time first, then by how close to training they are."""

PART_ORDER = ("detect", "decide", "restart", "restore", "first_step", "recompute")
"""Parts of a recovery in the order in which they happen."""

_MEANING = {
    "productive": "steps that count",
    "starting": "from pod to first step",
    "data wait": "a step waited for its batch",
    "checkpoint stall": "training waited for a checkpoint",
    "evaluating": "loss on held-out text",
    "detecting": "from a fault until it was noticed",
    "recovering": "from notice to the first new step",
    "recomputing": "steps done again after a fault",
    "idle spare": "warm pods that waited for a fault",
    "unattributed": "not accounted for",
}


def figures(journal: Journal, ledger: dict[str, float]) -> str:
    """The row of numbers at the top."""
    lineage = journal.lineage
    tokens = sum(step.tokens for step in lineage)
    cards = [
        ("steps", f"{len(lineage):,}", f"{journal.recomputed} done again" if journal.recomputed else "none done again"),
        ("tokens", scale.short(tokens), f"{scale.short(tokens / max(journal.end - journal.begin, 1e-9))}/s over all"),
        (
            "duration",
            scale.duration(journal.end - journal.begin),
            f"{scale.duration(sum(ledger.values()))} of GPU time",
        ),
    ]
    if lineage:
        cards.append(("training loss", f"{lineage[-1].loss:.3f}", f"from {lineage[0].loss:.3f}, nats per token"))
    if journal.evaluations:
        last = journal.evaluations[-1]
        note = f"at step {last.step}, nats per token"
        if last.bigram_loss is not None:
            gap = last.bigram_loss - last.loss
            note = f"{abs(gap):.2f} nats {'below' if gap >= 0 else 'above'} the bigram model"
        cards.append(("held-out loss", f"{last.loss:.3f}", note))
    goodput = goodput_of(ledger)
    if goodput is not None:
        cards.append(("goodput", f"{goodput:.1%}", "productive share of GPU time"))
    survived = sum(fault.recovered_at is not None for fault in journal.faults)
    cards.append(("faults", str(len(journal.faults)), f"{survived} recovered from" if journal.faults else "none"))
    return "".join(
        f'<div class="card"><div class="name">{name}</div><div class="value">{value}</div>'
        f'<div class="note">{note}</div></div>'
        for name, value, note in cards
    )


def goodput_of(ledger: dict[str, float]) -> float | None:
    """Productive share of the GPU-seconds, queued and suspended ones left out."""
    counted = sum(seconds for name, seconds in ledger.items() if name not in ("queued", "suspended"))
    return ledger.get("productive", 0.0) / counted if counted > 0 else None


def ledger_section(ledger: dict[str, float]) -> str:
    """Where every GPU-second went."""
    known = [name for name in LEDGER_ORDER if ledger.get(name, 0.0) > 0]
    names = known + sorted(name for name in ledger if name not in LEDGER_ORDER and ledger[name] > 0)
    total = sum(ledger[name] for name in names)
    if not total:
        return _missing("The journal has no ledger yet.")
    rows = [
        (
            f'<span class="swatch {charts.css_class(name)}"></span>{escape(name)}',
            f"{ledger[name]:,.1f}",
            f"{ledger[name] / total:.1%}",
            escape(_MEANING.get(name, "")),
        )
        for name in names
    ]
    rows.append(("<b>all</b>", f"<b>{total:,.1f}</b>", "<b>100%</b>", ""))
    bar = charts.bar({name: ledger[name] for name in names}, "GPU-seconds", 34)
    return bar + _table(("class", "GPU-seconds", "share", ""), rows, "lrrl")


START_SECTIONS = ("data", "rendezvous", "build", "restore")
"""What a worker does once, before its first step. The first step's record carries it."""


def step_section(journal: Journal) -> str:
    """How an average step spends its time, and an average start of the workers."""
    totals: dict[str, float] = {}
    for step in journal.steps:
        for name, seconds in step.sections.items():
            totals[name] = totals.get(name, 0.0) + seconds
    starts = sum("build" in step.sections for step in journal.steps)
    in_steps = {name: total / len(journal.steps) for name, total in totals.items() if name not in START_SECTIONS}
    in_starts = {name: total / starts for name, total in totals.items() if name in START_SECTIONS and starts}
    return _average("An average step", in_steps) + _average(f"An average start of the workers, of {starts}", in_starts)


def _average(title: str, seconds: dict[str, float]) -> str:
    parts = {name: value for name, value in sorted(seconds.items(), key=lambda pair: -pair[1]) if value > 0}
    total = sum(parts.values())
    if not total:
        return ""
    legend = "".join(
        f'<span class="key"><span class="swatch {charts.css_class(name)}"></span>{escape(name.replace("_", " "))} '
        f"<b>{value * 1000:,.1f} ms</b> {value / total:.0%}</span>"
        for name, value in parts.items()
    )
    return f"<h2>{title}</h2>{charts.bar(parts)}<p class='legend'>{legend}</p>"


def fault_section(journal: Journal) -> str:
    """Every fault: what broke, who noticed, how it was mended, what each part cost."""
    if not journal.faults:
        return _missing("Nothing broke in this run.")
    longest = max(sum(_parts(fault).values()) for fault in journal.faults) or 1.0
    rows = []
    for number, fault in enumerate(journal.faults, 1):
        rows.append(
            (
                f"<b>{number}</b>",
                scale.clock(fault.at - journal.begin),
                f"<b>{escape(fault.cause)}</b>{_exit(fault)}<br><span class='dim'>{escape(_where(fault))}</span>"
                + (f"<br>{escape(fault.message)}" if fault.message else ""),
                escape(fault.rung)
                + (f"<br><span class='dim'>seen by {escape(fault.witness)}</span>" if fault.witness else ""),
                *_cost(fault, longest),
                "–" if fault.steps_lost is None else str(fault.steps_lost),
            )
        )
    legend = "".join(
        f'<span class="key"><span class="swatch {charts.css_class(name)}"></span>{name.replace("_", " ")}</span>'
        for name in PART_ORDER
    )
    table = _table(
        ("", "at", "what broke", "mended by", "seconds per part", "in all", "steps redone"), rows, "rrlllrr", "faults"
    )
    logs = "".join(
        f"<details><summary>Last output before fault {number}</summary>"
        f"<pre>{escape(chr(10).join(fault.log_tail))}</pre></details>"
        for number, fault in enumerate(journal.faults, 1)
        if fault.log_tail
    )
    return f"{table}<p class='legend'>{legend}</p>{logs}"


def _cost(fault: Fault, longest: float) -> tuple[str, str]:
    """What the recovery cost, in parts and in all, where the longest took so many seconds."""
    if fault.mended_with is not None:
        return f"<span class='dim'>one recovery with fault {fault.mended_with + 1}, which has its cost</span>", "–"
    parts = _parts(fault)
    if parts:
        seconds = sum(parts.values())
        bar = f'<div class="cost" style="width:{100 * seconds / longest:.1f}%">{charts.bar(parts, height=12)}</div>'
        return f'{bar}<div class="parts">{_named(parts)}</div>', f"{seconds:.1f} s"
    # Recomputation goes on after the first new step: what the job waited is the time until that step.
    return "–", f"{fault.recovered_at - fault.at:.1f} s" if fault.recovered_at is not None else "not recovered"


def _parts(fault: Fault) -> dict[str, float]:
    ordered = [name for name in PART_ORDER if name in fault.seconds]
    ordered += sorted(name for name in fault.seconds if name not in PART_ORDER)
    return {name: fault.seconds[name] for name in ordered if fault.seconds[name] > 0}


def _named(parts: dict[str, float]) -> str:
    return ", ".join(
        f"{escape(name.replace('_', ' '))} {seconds:.1f}" for name, seconds in parts.items() if seconds >= 0.05
    )


def _exit(fault: Fault) -> str:
    if fault.exit_code is None:
        return ""
    return f", signal {-fault.exit_code}" if fault.exit_code < 0 else f", exit code {fault.exit_code}"


def _where(fault: Fault) -> str:
    parts = [
        f"rank {fault.rank}" if fault.rank is not None else "",
        f"slot {fault.slot}" if fault.slot is not None else "",
        f"node {fault.node}" if fault.node else "",
        f"step {fault.step}" if fault.step is not None else "",
    ]
    return ", ".join(part for part in parts if part) or "the whole job"


def suspension_section(journal: Journal) -> str:
    """When the job had no pods because it was suspended; nothing where it never was."""
    if not journal.suspensions:
        return ""
    rows = [
        (
            scale.clock(each.at - journal.begin),
            "not yet" if each.until is None else scale.clock(each.until - journal.begin),
            "–" if each.until is None else scale.duration(each.until - each.at),
        )
        for each in journal.suspensions
    ]
    return "<h2>Suspended</h2>" + _table(("at", "resumed at", "for"), rows, "rrr", "narrow")


def checkpoint_section(journal: Journal) -> str:
    """Checkpoints that became durable."""
    if not journal.checkpoints:
        return _missing("No checkpoint became durable.")
    rows = [
        (
            f"{c.step:,}",
            scale.clock(c.at - journal.begin),
            f"{c.seconds:.2f}",
            scale.size(c.bytes),
            f"<code>{escape(c.manifest)}</code>",
        )
        for c in journal.checkpoints[-12:]
    ]
    hidden = len(journal.checkpoints) - len(rows)
    note = f"<p class='dim'>and {hidden} earlier ones</p>" if hidden else ""
    return _table(("step", "at", "seconds", "size", "manifest"), rows, "rrrrl") + note


def evaluation_section(journal: Journal) -> str:
    """Losses on text that the model has not seen."""
    if not journal.evaluations:
        return ""
    rows = [
        (f"{e.step:,}", f"{e.loss:.4f}", f"{e.tokens:,}", "–" if e.bigram_loss is None else f"{e.bigram_loss:.4f}")
        for e in journal.evaluations[-12:]
    ]
    return "<h2>Held-out text</h2>" + _table(("step", "loss", "tokens", "bigram model"), rows, "rrrr")


def text_section(journal: Journal) -> str:
    """What the model writes."""
    if not journal.texts:
        return ""
    text = journal.texts[-1]
    return (
        f"<h2>What it writes after step {text.step:,}</h2>"
        f'<pre class="sample"><span class="prompt">{escape(text.prompt)}</span>'
        f"{escape(text.text.removeprefix(text.prompt))}</pre>"
    )


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], align: str, css: str = "") -> str:
    """An HTML table; ``align`` has one of l, r per column. Cells are HTML."""
    head = "".join(f'<th class="{a}">{escape(h)}</th>' for h, a in zip(heads, align, strict=True))
    body = "".join(
        "<tr>" + "".join(f'<td class="{a}">{cell}</td>' for cell, a in zip(row, align, strict=True)) + "</tr>"
        for row in rows
    )
    return f'<table class="{css}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def _missing(sentence: str) -> str:
    return f'<p class="dim">{sentence}</p>'
