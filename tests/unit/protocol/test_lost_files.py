"""A file that was uploaded and is not in the store when its state is to be committed: somebody has removed it, or the
pods do not share the folder. Everything else must go on, and the state be brought there again."""

from __future__ import annotations

from lockstep_api.messages import (
    Abandon,
    Beat,
    RestorePoint,
    Staged,
    StateId,
    Steps,
    StepSummary,
    StoredFile,
    Term,
    Upload,
    Uploaded,
    UploadProblem,
    WorkerExited,
)
from lockstep_trainer.protocol import events
from lockstep_trainer.protocol.effects import Commit, Effect, SendMember, UploadState
from lockstep_trainer.protocol.holdings import Holdings, HoldingsMemory
from lockstep_trainer.protocol.leader import Leader
from unit.protocol.test_guards import JOB, leading

FILES = (StoredFile("__0_0.distcp", 4, "00"),)
WHY = "checkpoint.uri: file:///ckpt/step-10-e1-g1/__0_0.distcp is not there"


class Run:
    """A job of one member, and what its leader wants."""

    def __init__(self) -> None:
        self.leader: Leader = leading()
        self.now = 2.0
        self.orders: list[Upload] = []
        self.commits: list[Commit] = []
        self.abandoned: list[str] = []

    def tell(self, event: events.LeaderEvent) -> None:
        self._note(self.leader.handle(event, self.now))

    def says(self, message: Beat | Staged | Steps | Uploaded | UploadProblem | WorkerExited) -> None:
        self.tell(events.MemberSaid(1, message))

    def wait(self, seconds: float) -> None:
        for _ in range(int(seconds)):
            self.now += 1.0
            self.says(Beat(JOB, self.leader.term, 0))
            self.tell(events.Tick())

    def staged(self, step: int) -> StateId:
        state = StateId(step, 1, 1)
        self.says(Staged(JOB, self.leader.term, 0, state, True))
        return state

    def uploaded(self, state: StateId, *, again: bool = False) -> None:
        self.says(Uploaded(JOB, self.leader.term, 0, state, FILES, "{}", again=again))

    def refused(self, times: int) -> None:
        """So many commits in a row find that a file is not there."""
        for _ in range(times):
            commit = self.commits.pop()
            self.tell(events.CommitFailed(commit.term, commit.state, WHY, lost=True))
            self.wait(10)

    def lost(self, state: StateId) -> None:
        """What was uploaded is lost, and what is uploaded again."""
        self.uploaded(state)
        self.refused(4)
        self.uploaded(state, again=True)
        self.refused(1)

    def committed(self, state: StateId) -> None:
        commit = self.commits.pop()
        assert commit.state == state
        self.tell(events.CommitDone(commit.term, RestorePoint(state, f"step-{state.step}", "00")))

    def _note(self, effects: list[Effect]) -> None:
        self.commits += [one for one in effects if isinstance(one, Commit)]
        said = [one.message for one in effects if isinstance(one, SendMember)]
        self.orders += [one for one in said if isinstance(one, Upload) and one not in self.orders]
        self.abandoned += [one.cause for one in said if isinstance(one, Abandon)]


def test_a_commit_is_tried_some_times_before_a_file_counts_as_lost() -> None:
    """A network file system may show a file some seconds later."""
    run = Run()
    state = run.staged(10)
    run.uploaded(state)
    run.refused(3)
    assert [order.again for order in run.orders] == [False]
    run.committed(state)
    assert run.leader.durability.committed(state)


def test_what_is_lost_is_brought_again() -> None:
    run = Run()
    state = run.staged(10)
    run.uploaded(state)
    run.refused(4)
    assert [(order.state, order.again) for order in run.orders] == [(state, False), (state, True)]
    run.uploaded(state)  # said again by a member that has not heard of it
    assert run.commits == []
    run.uploaded(state, again=True)
    run.committed(state)
    assert run.leader.durability.committed(state)


def test_where_that_is_lost_too_the_next_state_goes_to_the_store() -> None:
    run = Run()
    run.lost(run.staged(10))
    run.wait(60)
    assert run.commits == []
    assert [order.state.step for order in run.orders] == [10, 10], "it is not brought there for ever"
    assert run.leader.keeping.problem(run.leader) == WHY
    newer = run.staged(20)
    assert run.orders[-1].state == newer
    assert not run.orders[-1].again
    run.uploaded(newer)
    run.committed(newer)
    assert run.leader.keeping.problem(run.leader) is None


def test_what_can_not_be_brought_again_is_given_up_as_well() -> None:
    """The store has a file of that name, of another size."""
    run = Run()
    state = run.staged(10)
    run.uploaded(state)
    run.refused(4)
    run.says(UploadProblem(JOB, run.leader.term, 0, state, "it exists already, with other content"))
    newer = run.staged(20)
    assert run.orders[-1].state == newer


def test_behind_the_last_step_it_is_made_again() -> None:
    """GPUs would stand idle for ever otherwise, with all work done."""
    run = Run()
    done = StepSummary(100, 1.9, 0.1, 2.0, 256, 1.0, 1e-3)
    run.says(Steps(JOB, run.leader.term, 0, (done,), "forward"))
    last = run.staged(100)
    run.says(WorkerExited(JOB, run.leader.term, 0, 0, 0))
    run.lost(last)
    assert run.abandoned[:1] == ["FinalCheckpointMissing, slot None"]
    assert last in run.leader.keeping.refused(), "its workers would have nothing to do"
    (suspect,) = run.leader.verdicts.suspects or run.leader.verdicts.history[-1:]
    assert suspect.error == WHY


def test_a_member_brings_its_files_again() -> None:
    term, state = Term(1, 1), StateId(10, 1, 1)
    holdings = Holdings(HoldingsMemory())
    order = Upload(JOB, term, state, None)
    assert UploadState(term, state, None) in holdings.ordered(order)
    holdings.uploaded(events.StateUploaded(state, FILES, "{}"))
    assert holdings.says(JOB, term, 0, 0.0) == [Uploaded(JOB, term, 0, state, FILES, "{}")]
    again = Upload(JOB, term, state, None, again=True)
    assert UploadState(term, state, None) in holdings.ordered(again)
    assert holdings.says(JOB, term, 0, 0.0) == []
    assert holdings.ordered(again) == [], "said again: it is under way"
    holdings.uploaded(events.StateUploaded(state, FILES, "{}"))
    assert holdings.says(JOB, term, 0, 0.0) == [Uploaded(JOB, term, 0, state, FILES, "{}", again=True)]
