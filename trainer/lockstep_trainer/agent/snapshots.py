"""The snapshots in this pod's memory, as its agent sees them: what is there, what must stay, what may go."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lockstep_api.messages import Copies, StateId, Term
from lockstep_trainer.checkpoint.plan import Plan
from lockstep_trainer.checkpoint.request import ask
from lockstep_trainer.checkpoint.snapshots import (
    BUDDIES,
    FOLDER,
    Snapshot,
    drop_beyond,
    held,
    is_busy,
    order,
    rank_folder,
    ranks_in,
    read_plan,
    read_state,
    write_state,
)
from lockstep_trainer.errors import Corrupt
from lockstep_trainer.protocol.events import Event, SnapshotsHeld, StateStaged

POLL_SECONDS = 0.03
_SETTLED_NS = 50_000_000
"""A folder's time has the kernel's coarse grain: what changed so lately may change again without a sign of it."""

_GONE = "gone-"
"""Folders of ranks that are put aside begin so. ``check_room`` counts their buffers as room, as all that are there."""


class Snapshots:
    """The folder ``snapshots`` of the run folder. Everything here takes well under a millisecond, but for giving memory
    back: the kernel takes 0.06 s for a gigabyte of it. What goes is put aside, and a thread removes it."""

    def __init__(self, run_dir: Path, ranks_per_slot: int, tell: Callable[[Event], None]) -> None:
        self.root = run_dir / FOLDER
        self.buddies = self.root / BUDDIES
        self._ranks_per_slot = ranks_per_slot
        self._tell = tell
        self._seen: dict[Path, tuple[int, dict[int, Snapshot]]] = {}
        self._plans: dict[tuple[Path, str], Plan] = {}
        self._staged: set[StateId] = set()
        self._copies: tuple[Copies, ...] | None = None
        self.newest: Snapshot | None = None
        """The newest one that all ranks of a slot have, as its first rank says it."""
        self.taken = 0
        """Snapshots of this slot seen by this agent."""
        self._remover = ThreadPoolExecutor(1, thread_name_prefix="snapshots")
        for folder in self.root.glob(f"{_GONE}*"):  # what an earlier agent has not come to
            self._remover.submit(shutil.rmtree, folder, ignore_errors=True)

    # --- watching ---------------------------------------------------------------------------------------------------

    async def watch(self) -> None:
        """Look again and again; never returns."""
        while True:
            self.look()
            await asyncio.sleep(POLL_SECONDS)

    def look(self) -> None:
        """Tell what is new: states that all ranks of a slot have staged, and what the volume holds."""
        own, copies = self._by_slot(self.root), self._by_slot(self.buddies)
        for slot, states in own.items():
            for state in sorted(states, key=order):
                if state not in self._staged:
                    self._tell_staged(slot, state)
        self._staged &= {state for states in own.values() for state in states}
        found = {
            (state, slot): made for of in (copies, own) for slot, states in of.items() for state, made in states.items()
        }
        now_held = tuple(
            Copies(state, slot, *made)
            for (state, slot), made in sorted(found.items(), key=lambda item: (item[0][1], order(item[0][0])))
        )
        if now_held != self._copies:
            self._copies = now_held
            self._tell(SnapshotsHeld(now_held))

    def _tell_staged(self, slot: int, state: StateId) -> None:
        self._staged.add(state)
        size, blocked = 0, 0.0
        first = slot * self._ranks_per_slot
        for rank in range(first, first + self._ranks_per_slot):
            folder = rank_folder(self.root, rank)
            snapshot = next(each for each in self._held(folder).values() if each.state == state)
            blocked = max(blocked, snapshot.blocked)
            try:
                size += self._plan(folder, snapshot.plan).size
            except Corrupt:  # whoever reads the snapshot finds it again
                continue
            if rank == first:
                self.newest = snapshot
        self.taken += 1
        self._tell(StateStaged(Term(state.epoch, state.generation), state, size, blocked))

    def _by_slot(self, root: Path) -> dict[int, dict[StateId, tuple[int, int]]]:
        """States that every rank of a slot has, with the step that their sample logs begin behind, and the number of
        nodes that trained."""
        ranks: defaultdict[int, list[dict[StateId, tuple[int, int]]]] = defaultdict(list)
        for rank in ranks_in(root):
            states = {each.state: self._made(each) for each in self._held(rank_folder(root, rank)).values()}
            ranks[rank // self._ranks_per_slot].append(states)
        return {
            slot: {state: made for state, made in each[0].items() if all(state in other for other in each)}
            for slot, each in ranks.items()
            if len(each) == self._ranks_per_slot
        }

    def _made(self, snapshot: Snapshot) -> tuple[int, int]:
        world = snapshot.header.get("layout", {}).get("world_size", 0)
        return snapshot.since, int(world) // self._ranks_per_slot

    def _held(self, folder: Path) -> dict[int, Snapshot]:
        try:
            changed = folder.stat().st_mtime_ns
        except FileNotFoundError:
            return {}
        known = self._seen.get(folder)
        if known and known[0] == changed:
            return known[1]
        found = held(folder)
        self._seen[folder] = (changed if time.time_ns() - changed > _SETTLED_NS else 0, found)
        return found

    def _plan(self, folder: Path, key: str) -> Plan:
        if (folder, key) not in self._plans:
            self._plans[folder, key] = read_plan(folder, key)
        return self._plans[folder, key]

    def _prune(self, kept: StateId) -> None:
        """Give back the memory of ranks that are kept elsewhere by now: those without a snapshot as new as ``kept``,
        which every slot has at home and at its buddy."""
        for root in (self.root, self.buddies):
            for rank in ranks_in(root):
                folder = rank_folder(root, rank)
                if all(order(each.state) < order(kept) for each in held(folder).values()) and not is_busy(folder):
                    self._remove(folder)

    def leave_only(self, ranks: range) -> None:
        """Give back the memory of all other ranks' snapshots: the generation that starts takes its state from the
        store, and this slot's ranks may be others than the last generation's."""
        for root in (self.root, self.buddies):
            for rank in ranks_in(root):
                folder = rank_folder(root, rank)
                if (root is self.buddies or rank not in ranks) and not is_busy(folder):
                    self._remove(folder)

    async def removed(self) -> None:
        """Until the memory of all that went is given back."""
        await asyncio.wrap_future(self._remover.submit(lambda: None))  # one thread, in this order

    def _remove(self, folder: Path) -> None:
        aside = self.root / f"{_GONE}{folder.name}-{time.time_ns()}"
        folder.rename(aside)
        self._remover.submit(shutil.rmtree, aside, ignore_errors=True)

    # --- what the workers are told ----------------------------------------------------------------------------------

    @property
    def kept(self) -> StateId | None:
        """The state that no writer may overwrite."""
        return read_state(self.root / "kept.json")

    @property
    def last_durable(self) -> StateId | None:
        """The newest durable state that this agent has heard of."""
        return read_state(self.root / "durable.json")

    def keep(self, state: StateId) -> None:
        """No writer may overwrite this state until the next one is kept."""
        write_state(self.root / "kept.json", state)
        pinned = read_state(self.root / "pinned.json")
        if pinned is not None and order(pinned) <= order(state):
            write_state(self.root / "pinned.json", None)
        self._prune(state)

    def pin(self, state: StateId) -> None:
        """This state is on its way to be kept."""
        self.root.mkdir(parents=True, exist_ok=True)
        write_state(self.root / "pinned.json", state)

    def durable(self, state: StateId) -> None:
        """The workers' sample logs need not go back behind it."""
        write_state(self.root / "durable.json", state)

    def request(self, *, hold: bool) -> None:
        """The workers take a snapshot as soon as may be; ``hold``: and no step behind it."""
        ask(self.root, hold=hold)

    def drop(self, term: Term, step: int) -> None:
        """Forget what is beyond ``step`` and older than ``term``."""
        for root in (self.root, self.buddies):
            drop_beyond(root, term, step)
        for name in ("kept.json", "pinned.json"):
            state = read_state(self.root / name)
            if state is not None and state.step > step and Term(state.epoch, state.generation) < term:
                write_state(self.root / name, None)
        self._seen.clear()
        self.look()
