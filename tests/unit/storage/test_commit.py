"""The swap of ``latest``: one line of history whatever answers get lost and however writers race."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep_api.messages import RestorePoint, StateId
from lockstep_trainer.checkpoint import commit
from lockstep_trainer.checkpoint.commit import (
    Done,
    Get,
    GetFailed,
    GetOk,
    Lost,
    Moved,
    Put,
    PutOk,
    PutRefused,
    PutUnsure,
)
from lockstep_trainer.checkpoint.manifest import Pointer


def pointer(sequence: int, epoch: int, nonce: str, step: int = 0) -> Pointer:
    state = StateId(step, epoch, 1)
    return Pointer(
        sequence=sequence,
        epoch=epoch,
        generation=1,
        nonce=nonce,
        point=RestorePoint(state, f"step-{step}-e{epoch}-g1/manifest.json", "0" * 64),
    )


MINE = pointer(2, epoch=3, nonce="me")


def test_a_put_that_is_acknowledged_is_done() -> None:
    swap, effect = commit.begin(MINE, "1")
    assert effect == Put(MINE, "1")
    assert commit.step(swap, PutOk())[1] == Done(MINE)


def test_a_refusal_is_success_where_the_retry_met_its_own_write() -> None:
    swap, _ = commit.begin(MINE, "1")
    swap, effect = commit.step(swap, PutRefused())
    assert effect == Get()
    assert commit.step(swap, GetOk(MINE, "2"))[1] == Done(MINE)


def test_another_swap_with_the_same_nonce_is_not_mistaken_for_this_one() -> None:
    """A leader that fenced and then commits uses one nonce twice."""
    swap, _ = commit.begin(MINE, "1")
    swap, _ = commit.step(swap, PutRefused())
    other = pointer(2, epoch=3, nonce="me", step=7)
    assert commit.step(swap, GetOk(other, "2"))[1] == Moved(other, "2")


def test_a_higher_term_stops_it() -> None:
    swap, _ = commit.begin(MINE, "1")
    swap, _ = commit.step(swap, PutRefused())
    newer = pointer(2, epoch=4, nonce="other")
    assert commit.step(swap, GetOk(newer, "2"))[1] == Lost(newer)


def test_an_unsure_put_is_tried_again_only_where_nothing_has_changed() -> None:
    swap, _ = commit.begin(MINE, None)
    swap, effect = commit.step(swap, PutUnsure())
    assert effect == Get()
    _, effect = commit.step(swap, GetOk(None, None))
    assert isinstance(effect, Put)
    assert effect.if_match is None
    assert effect.pause > 0


def test_it_gives_up_on_a_store_that_never_answers() -> None:
    swap, effect = commit.begin(MINE, None)
    calls = 0
    while not isinstance(effect, commit.GaveUp):
        swap, effect = commit.step(swap, PutUnsure() if isinstance(effect, Put) else GetFailed())
        calls += 1
        assert calls < 50
    assert calls >= commit.ATTEMPTS


# --- racing writers over a store that loses answers ----------------------------------------------------------------


@dataclass
class Store:
    """A conditional store, and every version that it ever held."""

    history: list[Pointer] = field(default_factory=list)

    @property
    def etag(self) -> str | None:
        return str(len(self.history)) if self.history else None

    def put(self, effect: Put) -> bool:
        if effect.if_match != self.etag:
            return False
        self.history.append(effect.pointer)
        return True


@dataclass
class Writer:
    """A leader of one term that swaps ``latest`` as often as it can: reads, swaps, reads again where it was moved."""

    epoch: int
    committed: list[Pointer] = field(default_factory=list)
    stopped: bool = False
    swap: commit.Swap | None = None
    effect: commit.Effect | None = None
    swaps: int = 0

    def turn(self, store: Store, fate: str) -> None:
        if self.stopped:
            return
        if self.swap is None:
            current = store.history[-1] if store.history else None
            if current is not None and current.epoch > self.epoch:
                self.stopped = True
                return
            self.swaps += 1
            new = pointer(len(store.history) + 1, self.epoch, f"writer-{self.epoch}", step=self.swaps)
            self.swap, self.effect = commit.begin(new, store.etag)
            return
        self.swap, self.effect = commit.step(self.swap, self._perform(store, fate))
        match self.effect:
            case Done(done):
                self.committed.append(done)
                self.swap = None
            case Lost():
                self.stopped, self.swap = True, None
            case Moved() | commit.GaveUp():
                self.swap = None

    def _perform(self, store: Store, fate: str) -> commit.Event:
        match self.effect:
            case Put() as put if fate == "lost before":
                return PutUnsure()
            case Put() as put:
                took_effect = store.put(put)
                if fate == "lost after":
                    return PutUnsure()
                # A client that repeats a put after a lost answer is refused by its own write.
                return PutOk() if took_effect and fate != "repeated" else PutRefused()
            case _ if fate == "lost before":
                return GetFailed()
            case _:
                return GetOk(store.history[-1] if store.history else None, store.etag)


FATES = st.sampled_from(["fine", "fine", "fine", "lost before", "lost after", "repeated"])


@settings(max_examples=300, deadline=None)
@given(turns=st.lists(st.tuples(st.integers(0, 2), FATES), max_size=120))
def test_racing_writers_make_one_line_of_history(turns: list[tuple[int, str]]) -> None:
    store = Store()
    writers = [Writer(epoch) for epoch in (1, 2, 3)]
    for number, fate in turns:
        writers[number].turn(store, fate)
        epochs = [version.epoch for version in store.history]
        assert epochs == sorted(epochs), "an older term has moved latest behind a newer one"
        assert [version.sequence for version in store.history] == list(range(1, len(store.history) + 1))
    for writer in writers:
        own = [version for version in store.history if version.epoch == writer.epoch]
        assert len(set(own)) == len(own), "a swap took effect twice"
        assert all(done in own for done in writer.committed), "a swap was called done and is not in the history"
        assert len(set(writer.committed)) == len(writer.committed)
