"""The report is one file that stands alone and says what the journal says."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

import synthetic
from lockstep_cli import journal, store
from lockstep_cli.__main__ import main
from lockstep_cli.errors import CliError, NotFoundError
from lockstep_cli.report import charts, page, scale, series
from unit.cli.test_journal import suspended_and_resumed
from unit.storage.test_stores import refused_reading

VOID = {"meta", "br"}


class _Nesting(HTMLParser):
    """Fails on a tag that is closed out of order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture
def html() -> str:
    return page.render(journal.fold(synthetic.lines()), page.Heading("demo", "s3://bucket/demo"))


def test_it_is_well_formed(html: str) -> None:
    parser = _Nesting()
    parser.feed(html)
    assert parser.open == []


def test_it_loads_nothing_from_elsewhere(html: str) -> None:
    assert not re.search(r"""(?:src|href)=|url\(|@import|https?://""", html)


def test_it_tells_the_run(html: str) -> None:
    for words in (
        "Succeeded",
        "WorkerExited",
        "signal 9",
        "bigram model 4.050",
        "0.63 nats below",
        "recomputing",
        "demo-1-1",
    ):
        assert words in html


def test_it_says_that_training_began_on_other_data() -> None:
    changed = {
        "kind": "data_changed",
        "step": 20,
        "manifest": "s3://b/step-20-e1-g1/manifest.json",
        "message": "<seed>",
    }
    lines = [*synthetic.lines(), *({**changed, "at": at} for at in (1.0, 2.0))]  # at each start from there
    html = page.render(journal.fold(lines), page.Heading("demo", "s3://bucket/demo"))
    assert html.count("Trained on other data up to step 20: &lt;seed&gt;</p>") == 1


def a_step(number: int, **fields: object) -> dict[str, object]:
    """The line of a step in the journal, a second after the one before."""
    return {
        "kind": "step",
        "at": float(number),
        "epoch": 1,
        "generation": 1,
        "step": number,
        "loss": 3.0,
        "tokens": 100,
        "seconds": 1.0,
        **fields,
    }


def test_a_suspension_is_shown_as_one() -> None:
    html = page.render(journal.fold(suspended_and_resumed()), page.Heading("demo", "x"))
    assert "Nothing broke" in html
    assert 'class="recovery"' not in html
    assert html.count('<rect class="suspension"') == 4  # one in each chart
    assert '<td class="r">1:00</td><td class="r">2:01:00</td><td class="r">2 h 00 min</td>' in html
    assert html.count('<rect class="held held-0"') == html.count('<rect class="held held-1"') == 2  # a gap in between
    assert 'class="suspension"' not in page.render(journal.fold(synthetic.lines()), page.Heading("demo", "x"))


def test_faults_of_one_recovery_show_its_cost_once() -> None:
    lines = synthetic.lines()
    first = next(line for line in lines if line["kind"] == "fault")
    lines.insert(lines.index(first) + 1, {**first, "rank": 2})
    html = page.render(journal.fold(lines), page.Heading("demo", "x"))
    assert html.count("restart 0.7") == 1
    assert html.count("one recovery with fault 1, which has its cost") == 1
    assert html.count('<rect class="recovery"') == 2 * 4  # of two recoveries in four charts


def test_the_cursor_tells_the_time_as_the_axis_does() -> None:
    told = journal.fold([a_step(0), a_step(3755)])
    assert [row[-1] for row in charts.hover_data(told)] == ["0:00", "1:02:35"]
    html = page.render(told, page.Heading("demo", "x"))
    assert ">1:00:00</text>" in html
    assert '"1:02:35"]' in html


def test_text_of_a_run_can_not_become_markup() -> None:
    lines = [
        {"kind": "text", "at": 1.0, "epoch": 1, "generation": 1, "step": 1, "prompt": "", "text": "</pre><script>x"},
        {
            "kind": "fault",
            "at": 1.0,
            "epoch": 1,
            "generation": 1,
            "cause": "<b>",
            "rung": "<i>",
            "log_tail": ["<script>y"],
        },
        {"kind": "recovered", "at": 2.0, "epoch": 1, "generation": 2, "seconds": {'"><script>z': 1.0}},
        a_step(1, sections={'"><script>v': 1.0}),
        {"kind": "ledger", "at": 3.0, "epoch": 1, "classes": {'"><script>w': 1.0}},
    ]
    html = page.render(journal.fold(lines), page.Heading("<u>", "<s>"))
    assert "<script>x" not in html
    assert "<script>y" not in html
    assert not re.search(r"<script>[vwz]", html)
    assert not re.search(r"<u>|<s>|<i>|<b><b>", html)


def test_a_run_that_has_only_begun_has_a_report() -> None:
    html = page.render(journal.fold(synthetic.lines()[:2]), page.Heading("demo", "x"))
    assert "Running" in html
    assert "Nothing broke" in html


@pytest.mark.parametrize("loss", ["nan", "inf"])
def test_a_held_out_loss_that_is_no_number_is_told_and_not_drawn(loss: str) -> None:
    """Training ends itself at such a loss; an evaluation behind its last update may still meet one."""
    evaluation = {"kind": "evaluate", "at": 3.0, "step": 2, "loss": float(loss), "tokens": 10}
    html = page.render(journal.fold([a_step(1), a_step(2), evaluation]), page.Heading("demo", "x"))
    assert f'<div class="value">{loss}</div>' in html
    assert not re.search(r'"[\d., -]*(?:nan|inf)\b', html)


def test_a_million_steps_stay_a_small_file() -> None:
    html = page.render(journal.fold(synthetic.lines(steps=30_000)), page.Heading("demo", "x"))
    assert len(html) < 1_000_000


def test_the_command_finds_the_newest_run_below_a_uri(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for uid, seed in (("old", 0), ("new", 1)):
        for key, content in synthetic.files(seed).items():
            file = tmp_path / "ns/demo" / uid / key
            file.parent.mkdir(parents=True, exist_ok=True)
            # The one that ended later is the newer one, whatever the folders are called.
            file.write_bytes(content if uid == "new" else content.splitlines(keepends=True)[0])
    out = tmp_path / "out.html"
    assert main(["report", "--uri", str(tmp_path / "ns"), "-o", str(out)]) == 0
    assert "demo/new/" in out.read_text()
    below = tmp_path / "ns"
    assert capsys.readouterr().out.endswith(f" of {below}/demo/new/, the newest of 2 runs below {below}\n")
    assert main(["report", "--uri", str(below / "demo" / "old"), "-o", str(out), "--output", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["run"] == f"{below}/demo/old/"


def test_a_run_is_found_beside_folders_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ns/demo/uid/journal/e1-g1-1.jsonl", "lost+found/x"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text('{"kind": "step", "at": 1.0}\n')
    refused_reading(monkeypatch, "lost+found")
    assert store.find_runs(store.open_uri(str(tmp_path)), str(tmp_path)) == ["ns/demo/uid/"]


def test_a_place_without_a_journal_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no journal below it"):
        store.find_runs(store.open_uri(str(tmp_path)), str(tmp_path))


def test_what_a_folder_does_not_give_is_no_matter_of_credentials(tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").mkdir()
    with pytest.raises(CliError, match=r": Is a directory$"):
        store.open_uri(str(tmp_path)).get("journal.jsonl")


def test_ticks_are_round_and_inside() -> None:
    assert scale.ticks(0.13, 0.97, 5) == [0.2, 0.4, 0.6, 0.8]
    assert scale.ticks(3, 3) == [3]
    assert scale.time_ticks(95) == [0, 15, 30, 45, 60, 75, 90]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(3.21, "3.2 s"), (45, "45 s"), (245, "4 min 05 s"), (7800, "2 h 10 min"), (273_600, "3 d 4 h")],
)
def test_durations_as_people_write_them(seconds: float, text: str) -> None:
    assert scale.duration(seconds) == text


def test_throughput_keeps_all_tokens_and_shows_gaps_as_zero() -> None:
    steps = [journal.Step(n, at, 1.0, 100, 1.0, 1, 1) for n, at in ((1, 1.0), (2, 2.0), (3, 9.0))]
    new, again = series.throughput(steps, 0.0, 10.0, 10)
    assert sum(new) == pytest.approx(300)
    assert new[4] == 0
    assert again == [0.0] * 10
