"""One-line changes of the rules. Each must make the simulation fail: ``python -m simulation.mutations NAME``.

A change is made to the source while it is imported, in a process of its own. Many rules guard each other (a member
would refuse what a leader should not have sent); here are those that nothing else makes up for within the bound.
"""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import ModuleType

TESTS = Path(__file__).parents[1]
PACKAGE = "lockstep_trainer.protocol."
SEEDS = 400
"""Tried at most; most mutants live for fewer than ten."""


@dataclass(frozen=True)
class Mutation:
    """Replace ``old``, which must be there exactly once, by ``new``."""

    name: str
    module: str
    old: str
    new: str
    breaks: str
    """The rule, in words."""
    first: int = 0
    """Seed to begin with: where a mutant lives long, one just before the first that finds it."""
    package: str = PACKAGE
    """``simulation.``: a promise of the agent's shell, which the protocol relies on."""
    test: str = ""
    """Below ``tests``: the file that notices it, where schedules do not."""


MUTATIONS = (
    Mutation(
        "keep-what-a-stale-generation-stages", "keeping",
        "self._keep_to(self.lineage.without(leader.term))", "pass",
        "what workers make that began from the wrong state is neither kept nor brought to the store",
        test="unit/protocol/test_stale_restore.py",
    ),
    Mutation(
        "begin-from-what-passed-the-chain-by", "lineage",
        "return origin is not None and term_of(state) < origin.term and origin.step < state.step", "return False",
        "a state in memory that does not descend from the chain's newest is not begun from",
        test="unit/protocol/test_stale_restore.py",
    ),
    Mutation(
        "begin-from-memory-that-passed-a-doubtful-commit-by", "beginning",
        "ancestors.holds(state) and not passed_over(state, origin)", "ancestors.holds(state)",
        "where the chain does not answer, a state in memory descends from all that it may name",
        test="unit/protocol/test_stale_restore.py",
    ),
    Mutation(
        "forget-late-steps", "hearing",
        "return leader.reports.late(leader, leader.steps.add(peer.info.slot, message.done), now)", "return []",
        "steps that are heard of while their generation quiesces are in the journal: the next one may go on from there",
    ),
    Mutation(
        "forget-steps-that-one-node-has-told", "leader",
        "if quiet:  # whoever", "if False:  # whoever",
        "a step of a generation that is over is in the journal, whoever has told of it: there may be a state of it",
    ),
    Mutation(
        "forget-who-is-suspected", "leader",
        "suspects=tuple(self.verdicts.suspects),", "suspects=(),",
        "a fault that waits for its judgement outlives the leader's agent: each one has a record", first=130,
    ),
    Mutation(
        "forget-the-steps-before-a-new-leader", "member",
        "if workers.made_in and (workers.running or workers.recent):", "if workers.running:",
        "a new leader hears of the last steps also of workers that are gone",
        test="unit/protocol/test_late_steps.py",
    ),
    Mutation(
        "start-before-all-are-quiet", "leader",
        "if self.finished or not quiet:", "if self.finished:",
        "a generation starts once all members have reaped the last one's workers",
    ),
    Mutation(
        "reuse-generation", "leader",
        "self.generation += 1", "self.generation += 0",
        "a generation's number is used once",
    ),
    Mutation(
        "quiesced-before-reaped", "member",
        "return effects if self.workers.live else [*effects, *self._quiesced(now)]",
        "return [*effects, *self._quiesced(now)]",
        "Quiesced means that every worker is reaped",
    ),
    Mutation(
        "quiesced-before-all-have-left", "nodeworkers",
        "self.live.discard(event.rank)\n        self.resting.add", "self.live.clear()\n        self.resting.add",
        "Quiesced means that every worker is reaped, or out of its generation",
    ),
    Mutation(
        "launch-before-persist", "member",
        "first = [Persist(), *snapshots, Launch", "first = [*snapshots, Launch",
        "what runs is remembered before it runs",
    ),
    Mutation(
        "start-without-the-chain", "durability",
        "self.known = not self.enabled", "self.known = True",
        "a new epoch fences the chain and starts from what it names",
    ),
    Mutation(
        "succeed-before-it-is-durable", "leader",
        "if self.durability.pending or durable is None or durable.state.step < last:", "if False:",
        "a job has succeeded when its last state is durable",
    ),
    Mutation(
        "forget-the-generation", "leader",
        "self.generation = memory.generation if memory and same else 0", "self.generation = 0",
        "a leader's new agent goes on with the old one's count",
    ),
    Mutation(
        "kill-only-once-a-lifetime", "nodeworkers",
        "self.abandoning = term\n", "self.abandoning = self.abandoning or Term(0, 0)\n",
        "Abandon ends the generation that it names",
    ),
    Mutation(
        "count-a-silent-member-in", "roster",
        "return all(peer.connected and peer.quiet for peer in self.members.values())",
        "return all(peer.quiet for peer in self.members.values() if peer.connected)",
        "a generation needs all its members", first=31,
    ),
    Mutation(
        "keep-what-not-all-are-at", "snapshots",
        "if len(self.at) < self.slots or len(self._states) > 1 or self._gone:", "if len(self.at) < self.slots:",
        "a state is kept once all slots have it",
    ),
    Mutation(
        "keep-without-copies", "snapshots",
        "(self._lacking.discard if message.copied else self._lacking.add)(message.slot)", "pass",
        "a state is kept once every buddy has it",
    ),
    Mutation(
        "promise-at-staging", "holdings",
        "fresh = StagedState(event.state, not self.memory.buddy,", "fresh = StagedState(event.state, True,",
        "copied is said when the buddy has verified it",
    ),
    Mutation(
        "take-a-promise-back", "holdings",
        "return self._go_to_later() if staged is None else [Persist()]", "return self._go_to_later()",
        "a member is at one state until that is kept or void",
    ),
    Mutation(
        "overwrite-what-is-promised", "holdings",
        "*([PinSnapshot(staged.state)] if staged else [])", "*[]",
        "what is on its way to be kept is not overwritten",
    ),
    Mutation(
        "overwrite-what-is-kept", "holdings",
        "[Persist(), KeepSnapshot(message.state)]", "[Persist()]",
        "what all keep is not overwritten",
    ),
    Mutation(
        "say-kept-only-once", "keeping",
        "if kept is not None and order_of(message.state) <= order_of(kept):", "if False:",
        "Staged is answered until Kept has arrived",
    ),
    Mutation(
        "commit-a-torn-folder", "uploads",
        "if len(self.done) < wanted or known == wanted:", "if 0 not in self.done or known == wanted:",
        "a manifest is made once all slots have uploaded",
    ),
    Mutation(
        "wait-for-what-never-comes", "keeping",
        "for slot in sorted(self.snapshots.add(message, now)):", "for slot in self.snapshots.add(message, now) and ():",
        "who is at a state that some slot is past is told that it is void",
    ),
    Mutation(
        "start-from-half-a-set", "lineage",
        "if len(found) == len(members)]", "if found]",
        "a generation starts from memory where every slot has a copy",
    ),
    Mutation(
        "start-from-what-was-cut-off", "lineage",
        "if state not in set(refused) and not excluded(state, cut)]", "if state not in set(refused)]",
        "states that wrong numbers may have spoiled are not started from",
    ),
    Mutation(
        "leave-the-chain-where-it-is", "durability",
        "return [ChooseRestore(term, self.cut, self.anchor)]", "return [ChooseRestore(term, None, self.anchor)]",
        "the chain goes back behind what wrong numbers may have spoiled",
    ),
    Mutation(
        "give-up-a-copy-that-is-busy", "transfers",
        "self._copy_again(effect, 0.2)", "pass",
        "an agent goes on trying until the buddy has the copy", package="simulation.",
    ),
    Mutation(
        "name-who-is-away-though-another-left-too", "dispute",
        "if any(rank not in places or places[rank].pod != pod for rank, pod in others):", "if False:",
        "of several that are accused one is named only where the others still compute",
        first=2990,
    ),
    Mutation(
        "take-who-was-condemned-for-gone", "dispute",
        "return tuple(each for each in dispute.aside if each.pod not in here)", "return dispute.aside",
        "who is still there was not put aside, whatever was decided",
        first=440,
    ),
)  # fmt: skip

GUARDS = (
    Mutation(
        "take-an-earlier-epochs-answer", "durability",
        "(self._committing.state, self._epoch) == (state, term.epoch)", "self._committing.state == state",
        "an answer belongs to one commit, and not to all of its state",
        test="unit/protocol/test_guards.py",
    ),
    Mutation(
        "wait-for-a-state-that-is-gone", "holdings",
        "if known and not _gives_way(known, order) and", "if known and",
        "where the newest state in memory is lost, the next is brought to the store",
        test="unit/protocol/test_uploads.py",
    ),
    Mutation(
        "wait-for-what-another-has-lost", "holdings",
        "if order.slots:", "if False:",
        "where a few members bring the copies of all, what the leader says last counts",
        test="unit/protocol/test_uploads.py",
    ),
    Mutation(
        "blame-who-lost-its-peer", "hearing",
        "        if peer.container_restarted:", "        if False:",
        "a container that was started again is the root of what its workers' peers say",
        test="unit/protocol/test_restarted_container.py",
    ),
    Mutation(
        "give-up-who-waits-its-turn", "verdicts",
        "now - max(peer.missing_since, arrival) > grace", "now - peer.missing_since > grace",
        "while an epoch forms, the grace counts from the last arrival",
        test="unit/protocol/test_forming.py",
    ),
    Mutation(
        "start-while-committing", "beginning",
        "return not durability.busy, point", "return True, point",
        "no restore point is chosen while a commit is under way",
        test="unit/protocol/test_guards.py",
    ),
    Mutation(
        "keep-workers-without-memory", "member",
        "running = memory.running if memory.container_starts == me.container_starts else None",
        "running = None",
        "a new agent adopts the workers of the old one",
        test="unit/protocol/test_width.py",
    ),
    Mutation(
        "trust-a-lost-answer", "durability",
        "            self.known = False\n", "            pass\n",
        "a commit without an answer may have taken effect: ask the chain",
        test="unit/protocol/test_guards.py",
    ),
    Mutation(
        "believe-an-old-answer", "durability",
        "return self._committing is not None and (self._committing.state, self._epoch) == (state, term.epoch)",
        "return True",
        "an answer to an earlier epoch's commit says nothing about this one's",
        test="unit/protocol/test_guards.py",
    ),
    Mutation(
        "start-from-shards-of-another-width", "lineage",
        "fits = copy.nodes in (0, len(members))", "fits = True",
        "copies that another number of nodes has made hold other shards",
        test="unit/protocol/test_width.py",
    ),
    Mutation(
        "a-spare-works-on", "member",
        "if self.spare and workers.running:", "if False:",
        "a pod that is no member ends its workers",
        test="unit/protocol/test_width.py",
    ),
    Mutation(
        "start-before-the-rescue", "beginning",
        "if keeping.uploads.shares:", "if False:",
        "a state that only memory has is brought to the store before another number of nodes begins",
        test="unit/protocol/test_width.py",
    ),
    Mutation(
        "files-of-another-slot", "holdings",
        "if upload and (moved or upload.order.state.step > step):", "if upload and upload.order.state.step > step:",
        "a folder that is committed has the files of every slot",
        test="unit/protocol/test_width.py",
    ),
    Mutation(
        "files-that-nobody-was-asked-for", "uploads",
        "message.slots != (self.shares.get(message.slot) if self.shares else ())",
        "message.slots != self.shares.get(message.slot, ())",
        "while a few slots bring the copies of all, nothing counts that others once brought to another order",
        test="unit/protocol/test_uploads.py",
    ),
    Mutation(
        "obey-an-old-start", "member",
        "if start.term <= self.term or self.workers.running:", "if self.workers.running:",
        "a Start is obeyed once, and never after an Abandon of its generation",
        test="unit/protocol/test_guards.py",
    ),
    Mutation(
        "keep-workers-of-a-job-that-goes-on-elsewhere", "member",
        "return [Kill(message.term), *self._abandon", "return [*self._abandon",
        "who is released ends its workers, those that rest too",
        test="unit/protocol/test_resting.py",
    ),
    Mutation(
        "try-in-process-for-ever", "policy",
        "and not _tried_in_process(fault, earlier)", "and True",
        "a fault that comes again where it was goes a rung up",
        test="unit/protocol/test_resting.py",
    ),
    Mutation(
        "end-without-a-last-checkpoint", "stopping",
        "(self.out_of_time(now) or (ready and saved))", "True",
        "a job that is stopped leaves its newest state in the store, where there is time",
        test="unit/protocol/test_guards.py",
    ),
    Mutation(
        "begin-before-a-verdict", "beginning",
        "not durability.silent(now) or leader.verdicts.suspects:", "not durability.silent(now):",
        "a rank that computes wrong numbers is put aside before the next generation begins",
        test="unit/protocol/test_rollback.py",
    ),
    Mutation(
        "tie-to-whatever-the-chain-names", "beginning",
        "if leader.durability.durable == anchor:", "if True:",
        "what was made while the store was away is committed behind what it descends from",
        test="unit/protocol/test_store_away.py",
    ),
    Mutation(
        "ask-for-the-newest-when-the-store-is-back", "durability",
        "return [ChooseRestore(term, self.cut, anchor)]", "return [ChooseRestore(term, self.cut)]",
        "the chain goes back to what a generation that started without it descends from",
        test="unit/protocol/test_store_away.py",
    ),
    Mutation(
        "go-on-from-where-the-chain-went-without-it", "beginning",
        "durability.known and known.loose and known.durable != durability.durable", "False",
        "the next leader, too, sends the chain back to what the members' states descend from",
        test="unit/protocol/test_store_away.py",
    ),
    Mutation(
        "start-loose-at-once", "beginning",
        "if point is None or not durability.silent(now) or", "if point is None or",
        "a new epoch waits for the store's answer before it starts without",
        test="unit/protocol/test_store_away.py",
    ),
    Mutation(
        "lose-a-snapshot-without-a-word", "holdings",
        "gone = None if staged else later.state if later else gone", "gone = None",
        "nobody waits for a snapshot that its slot has lost",
        test="unit/protocol/test_lost_snapshot.py",
    ),
    Mutation(
        "forget-the-upload", "holdings",
        "if (upload := self.memory.upload) and upload.files is None and not upload.gone:",
        "if (upload := self.memory.upload) and False:",
        "a new agent goes on with the old one's upload",
        test="unit/protocol/test_guards.py",
    ),
    Mutation(
        "try-a-corrupt-copy-for-ever", "keeping",
        "self.tries[last] = TRIES if gave_up else self.tries.get(last, 0) + 1", "self.tries[last] = 0",
        "a snapshot that generations could not start from is not tried again",
        test="unit/protocol/test_guards.py",
    ),
    Mutation(
        "believe-an-old-generation", "hearing",
        "if message.term != leader.term:", "if False:",
        "messages of an older generation are dropped",
        test="unit/protocol/test_guards.py",
    ),
    Mutation(
        "commit-off-the-lineage", "durability",
        "if self._waiting and not lineage.holds(self._waiting.state):", "if False:",
        "what no generation descends from any more is not committed",
        test="unit/protocol/test_guards.py",
    ),
    Mutation(
        "leave-the-chain", "keeping",
        "if order.parent != durable:", "if False:",
        "an order whose parent the chain does not name any more is dropped",
        test="unit/protocol/test_guards.py",
    ),
    Mutation(
        "admit-every-copy", "lineage",
        "return origin is None or term_of(state) >= origin.term or state.step <= origin.step", "return True",
        "a copy that the newest generation does not descend from is not started from",
        test="unit/protocol/test_lineage.py",
    ),
    Mutation(
        "believe-what-was-brought-before", "uploads",
        " or message.again != self.order.again:", ":",
        "where a file was lost, only what was brought behind that counts",
        test="unit/protocol/test_lost_files.py",
    ),
    Mutation(
        "bring-what-is-lost-for-ever", "uploads",
        "if kept == self.lost:", "if False:",
        "a state whose files are lost twice is given up for the next one",
        test="unit/protocol/test_lost_files.py",
    ),
    Mutation(
        "forget-the-cut", "holdings",
        "self.memory = replace(self.memory, cut=newest)", "pass",
        "members remember what must not be started from, since the leader may be who computes wrong numbers",
        test="unit/protocol/test_rollback.py",
    ),
    Mutation(
        "pass-over-what-a-member-remembers", "hearing",
        "leader.keeping.exclude(leader, event.join.cut)", "pass",
        "a new leader learns of it from members",
        test="unit/protocol/test_rollback.py",
    ),
    Mutation(
        "give-the-pod-up-before-the-chain-knows", "leader",
        "cut_off = quiet and (self.durability.known or not self.keeping.cuts(self.abandoned))", "cut_off = quiet",
        "the chain has gone back before the leader's own pod may go",
        test="unit/protocol/test_rollback.py",
    ),
    Mutation(
        "believe-what-the-chain-named-before", "durability",
        "        if is_cut_off(restore, self.cut):\n            return False\n", "",
        "an answer of the chain from before a cut is asked for again",
        test="unit/protocol/test_rollback.py",
    ),
    Mutation(
        "count-replays-of-what-was-left", "keeping",
        "self.agreed = leader.durability.agreed = min(self.agreed, begun.step if begun else 0)", "pass",
        "a replay verifies only what it was trained from",
        test="unit/protocol/test_rollback.py",
    ),
    Mutation(
        "settle-by-any-step", "corruption",
        "if dispute is None or dispute.nodes != nodes or step < dispute.step:",
        "if dispute is None or dispute.nodes != nodes:",
        "a dispute is over once its own step agrees",
        test="unit/protocol/test_dispute.py",
    ),
    Mutation(
        "forget-the-dispute-with-its-leader", "corruption",
        "return replace(self, dispute=dispute)", "return replace(self, dispute=self.dispute)",
        "what is in dispute goes with the cut, from leader to leader",
        test="unit/protocol/test_dispute.py",
    ),
    Mutation(
        "copy-over-what-is-newer", "courier",
        "other not in self.must_stay and order(other) < order(self.state)", "other not in self.must_stay",
        "a late copy takes no newer one's place",
        package="lockstep_trainer.agent.", test="unit/agent/test_copies.py",
    ),
)  # fmt: skip
"""Rules that others nearly always make up for: hundreds of schedules do not need them. Each has a test of its own,
which the change must make fail."""


class _Loader(SourceFileLoader):
    def __init__(self, fullname: str, path: str, mutation: Mutation) -> None:
        super().__init__(fullname, path)
        self._mutation = mutation

    def get_code(self, fullname: str):  # type: ignore[no-untyped-def]
        path = self.get_filename(fullname)
        source = self.get_data(path).decode()
        assert source.count(self._mutation.old) == 1, f"{self._mutation.name}: the line is not there once"
        return compile(source.replace(self._mutation.old, self._mutation.new), path, "exec")


class _Finder(MetaPathFinder):
    def __init__(self, mutation: Mutation) -> None:
        self._mutation = mutation

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self._mutation.package + self._mutation.module:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        assert spec is not None
        assert spec.origin is not None
        spec.loader = _Loader(fullname, spec.origin, self._mutation)
        return spec


def main() -> None:
    """Exits 0 where the mutant was found out, 1 where it survived."""
    mutation = next(mutation for mutation in (*MUTATIONS, *GUARDS) if mutation.name == sys.argv[1])
    sys.meta_path.insert(0, _Finder(mutation))
    if mutation.test:
        import pytest

        failed = pytest.main(["-q", "-x", "--no-header", "-p", "no:cacheprovider", str(TESTS / mutation.test)])
        sys.exit(0 if failed == pytest.ExitCode.TESTS_FAILED else f"{mutation.name}: {mutation.test} is content")
    from simulation.run import run

    for seed in range(mutation.first, mutation.first + SEEDS):
        for short in (False, True):
            try:
                run(seed, short=short)
            except Exception as violation:  # a core that breaks down was noticed, too
                print(f"schedule {2 * (seed - mutation.first) + short + 1}: {violation!r}")
                sys.exit(0)
    sys.exit(f"{mutation.name} survived {SEEDS} seeds: {mutation.breaks}")


if __name__ == "__main__":
    main()
