"""What the demonstration says of a cluster and a job is shown as it is."""

from __future__ import annotations

import pytest
from rich.console import Console
from rich.text import Text

from demonstration.console import Story

STRANGE = "no [bold]user[/] says [/INST] :smile:"


def test_others_text_is_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    story = Story()
    story.chapter(STRANGE)
    story.say(STRANGE)
    story.say(Text.assemble(("lockstep why:", "dim"), f" {STRANGE}"))
    with story.step(STRANGE):
        story.progress(STRANGE)
    with pytest.raises(KeyError), story.step(STRANGE):
        raise KeyError
    assert capsys.readouterr().out.count(STRANGE) == 8


def test_nor_is_it_in_a_terminal() -> None:
    story = Story(Console(force_terminal=True, width=120, color_system=None))
    with story.console.capture() as shown, story.step(STRANGE):
        story.progress(f"{STRANGE} at step 5")
        assert story._status is not None
        story.console.print(story._status.renderable)
    assert f"{STRANGE} at step 5" in shown.get()
