"""The corruption benchmark goes on where it was stopped, also in the middle of a line."""

from __future__ import annotations

from pathlib import Path

from corruption.kept import Kept


def test_what_was_done_is_there_when_it_is_opened_again(tmp_path: Path) -> None:
    path = tmp_path / "a folder/state.jsonl"
    Kept(path).add("trial", "a", {"found": 1})
    Kept(path).add("clean", "a", {"found": 2})
    again = Kept(path)
    assert again.has("trial", "a")
    assert not again.has("cost", "a")
    assert [line["found"] for what in ("trial", "clean") for line in again.all(what)] == [1, 2]  # type: ignore[arg-type]


def test_half_a_line_is_done_again(tmp_path: Path) -> None:
    path = tmp_path / "state.jsonl"
    kept = Kept(path)
    kept.add("trial", "a", {})
    kept.add("trial", "b", {})
    path.write_text(path.read_text()[:-5])
    again = Kept(path)
    assert [again.has("trial", name) for name in "ab"] == [True, False]
    again.add("trial", "c", {})
    assert [line["name"] for line in Kept(path).all("trial")] == ["a", "c"]
