"""What breaks, when, from the seed."""

from __future__ import annotations

import random
from collections.abc import Callable

from lockstep_api.messages import StateId
from lockstep_trainer.protocol.events import PodEnding
from lockstep_trainer.protocol.lineage import order_of
from simulation.operator import Operator
from simulation.pods import Pod
from simulation.world import World


class Faults:
    """Breaks something every ``pause`` seconds in the mean until ``until``; then everything heals."""

    def __init__(self, world: World, pause: float, until: float) -> None:
        self.world = world
        self.pause = pause
        self.until = until
        self.count = 0
        self._ending: list[Pod] = []
        self._kinds: list[Callable[[Pod], None]] = [
            self._worker, self._worker, self._agent, self._agent, self._container, self._partition, self._partition,
            self._reboot, self._power_off, self._delete, self._store, self._rendezvous, self._operator,
            self._drain, self._corrupt, self._mute, self._slow_commits, self._no_room, self._no_room,
        ]  # fmt: skip
        if world.widths:
            self._kinds = [
                self._narrow, self._narrow, self._narrow, self._narrow, self._corrupt, self._agent, self._agent,
                self._worker, self._store, self._slow_commits, self._leaders_pod, self._reboot,
            ]  # fmt: skip
        if world.replays:
            # Between other faults there is time to train, and to make durable, what is wrong.
            self.pause = 2 * pause
            world.clockwork.after(world.clockwork.between(0.2, 0.7) * (until - world.clockwork.now), self._corrupting)
        if world.outages:
            self._dice = random.Random(f"outages of {world.seed}")  # other schedules draw what they drew before
            world.clockwork.after(self._dice.uniform(4.0, 12.0), self._outage)
        self._next()

    def _next(self) -> None:
        clockwork = self.world.clockwork
        pause = clockwork.random.expovariate(1 / self.pause)
        if clockwork.now + pause < self.until:
            clockwork.after(pause, self._strike)
        else:
            clockwork.after(self.until - clockwork.now, self._heal)

    def _strike(self) -> None:
        draw = self.world.random
        pod = draw.choice(self.world.current_pods())
        draw.choice(self._kinds)(pod)
        self.count += 1
        self._next()

    def _heal(self) -> None:
        world = self.world
        world.network.faulty = world.store.faulty = world.store.away = world.store.mute = False
        world.store.slowness = 0.0
        world.make_room()
        for pod in self._ending:  # no fault goes on into peace
            pod.delete()
        for pod in world.pods.values():
            if pod.powered:
                world.network.cut_off.discard(pod.name)
            if pod.corrupts:  # what was tried meanwhile shows nothing
                pod.corrupts = False
                world.invariants.wrong |= world.pods.keys()
            if not pod.exists:
                pod.delete()  # now its kubelet hears of it
        world.network.cut_off.discard("operator")
        if world.widths:  # the epoch that begins now has to go on with what is left
            self._newest_of_one()

    def _worker(self, pod: Pod) -> None:
        alive = [worker for worker in pod.workers if worker.alive]
        if alive:
            self.world.workers.end(self.world.random.choice(alive), self.world.random.choice([-9, -11, 1]))

    def _agent(self, pod: Pod) -> None:
        pod.kill_agent()

    def _container(self, pod: Pod) -> None:
        pod.restart_container()

    def _partition(self, pod: Pod) -> None:
        name = self.world.random.choice([pod.name, pod.name, "operator"])
        self.world.network.cut_off.add(name)

        def heal() -> None:
            if name == "operator" or self.world.pods[name].powered:
                self.world.network.cut_off.discard(name)

        self.world.clockwork.after(self.world.random.choice([0.5, 3.0, 12.0, 30.0]), heal)

    def _reboot(self, pod: Pod) -> None:
        if pod.powered:
            pod.power_off()
            self.world.clockwork.after(self.world.clockwork.between(1.0, 15.0), pod.power_on)

    def _power_off(self, pod: Pod) -> None:
        pod.power_off()

    def _delete(self, pod: Pod) -> None:
        pod.delete()

    def _drain(self, pod: Pod) -> None:
        """Preemption, say: the pod hears of it and is gone soon."""
        pod.tell(PodEnding(4.0))
        self._ending.append(pod)
        self.world.clockwork.after(4.0, pod.delete)

    def _no_room(self, pod: Pod) -> None:
        """A node is lost, and for a while there is none for another pod."""
        self.world.room = False
        pod.delete()
        self.world.clockwork.after(self.world.clockwork.between(4.0, 15.0), self.world.make_room)

    def _narrow(self, pod: Pod) -> None:
        """The same, and more: a pod's newest snapshots turn out to be damaged when others are to go on with them."""
        self._no_room(pod)

        def damage() -> None:
            if self.world.network.faulty:  # no fault goes on into peace
                self._newest_of_one()

        self.world.clockwork.after(self.world.clockwork.between(0.0, 15.0), damage)

    def _newest_of_one(self) -> None:
        """Of one of those pods that have the newest snapshots."""
        newest = self._newest_state()
        if newest is None or self.world.random.random() < 0.4:
            return
        pods = self.world.current_pods()
        holders = [pod for pod in pods if any(one.state == newest for one in pod.volume.snapshots)]
        for snapshot in self.world.random.choice(holders).volume.snapshots:
            snapshot.intact &= snapshot.state != newest
        self.world.invariants.corrupt.add(newest)

    def _newest_state(self) -> StateId | None:
        """Of which there is a snapshot."""
        snapshots = (one for pod in self.world.current_pods() for one in pod.volume.snapshots)
        return max((one.state for one in snapshots), key=order_of, default=None)

    def _corrupt(self, pod: Pod) -> None:
        """Bits flip in a snapshot."""
        if pod.volume.snapshots:
            victim = self.world.random.choice(pod.volume.snapshots)
            victim.intact = False
            self.world.invariants.corrupt.add(victim.state)

    def _corrupting(self) -> None:
        """From now on a pod's GPU computes wrong numbers. Once in a schedule: the same rank found at the same step in
        two pods would be no GPU."""
        pod = self.world.random.choice(self.world.current_pods())
        pod.corrupts = True
        self.world.invariants.wrong.add(pod.name)

    def _store(self, _: Pod) -> None:
        self.world.store.away = True

        def back() -> None:
            self.world.store.away = False

        self.world.clockwork.after(self.world.clockwork.between(0.5, 15.0), back)

    def _mute(self, pod: Pod) -> None:
        """A commit takes effect, and nobody hears of it; then who has asked for it is gone, or starts anew."""
        store = self.world.store
        store.mute, store.on_lost = True, lambda: self._soon(pod)

        def speak() -> None:
            store.mute, store.on_lost = False, None

        self.world.clockwork.after(self.world.clockwork.between(2.0, 8.0), speak)

    def _outage(self) -> None:
        """The store is away for longer than anybody waits for it, and members are lost meanwhile: by turns of chance
        behind a commit that took effect without an answer."""
        store, dice, after = self.world.store, self._dice, self.world.clockwork.after
        if not self.world.network.faulty:
            return
        store.mute = dice.random() < 0.5
        store.on_lost = lambda: self._follow(self._newest)

        def away() -> None:
            store.mute, store.on_lost, store.away = False, None, self.world.network.faulty
            kinds = [self._delete, self._leaders_pod, self._worker, self._newest]
            for delay in sorted(dice.uniform(0.0, 12.0) for _ in range(dice.choice([1, 1, 2, 3]))):
                after(delay, lambda: self._follow(dice.choice(kinds)))

        def back() -> None:
            store.away = False

        length = dice.uniform(8.0, 40.0)
        after(3.0, away)
        after(3.0 + length, back)
        after(3.0 + length + dice.uniform(1.0, 20.0), self._outage)

    def _newest(self, pod: Pod) -> None:
        """All agents find the newest snapshots damaged: what is left in memory may be older than what is durable."""
        if newest := self._newest_state():
            self.world.invariants.corrupt.add(newest)
            for victim in self.world.current_pods():
                victim.volume.snapshots[:] = [one for one in victim.volume.snapshots if one.state != newest]
                victim.tell_held()
        self._leaders_pod(pod)

    def _leaders_pod(self, _: Pod) -> None:
        if first := self.world.status["slots"].get(0):
            self.world.pods[first.pod].delete()

    def _slow_commits(self, pod: Pod) -> None:
        """Commits take seconds; meanwhile the generation that made them ends."""
        self.world.store.slowness = self.world.clockwork.between(1.0, 4.0)

        def fast() -> None:
            self.world.store.slowness = 0.0

        self.world.clockwork.after(self.world.clockwork.between(2.0, 6.0), fast)
        self._soon(pod)

    def _soon(self, pod: Pod) -> None:
        """Right behind a fault of the store comes another one: the chain must be asked before it is started from."""
        follow = self.world.random.choice([self._forget, self._forget, self._leader, self._worker])
        self.world.clockwork.after(self.world.clockwork.between(0.1, 2.0), lambda: self._follow(follow, pod))

    def _follow(self, fault: Callable[[Pod], None], pod: Pod | None = None) -> None:
        if self.world.network.faulty:
            fault(pod or self._dice.choice(self.world.current_pods()))
            self.count += 1

    def _leader(self, _: Pod) -> None:
        if first := self.world.status["slots"].get(0):
            self.world.pods[first.pod].kill_agent()

    def _forget(self, pod: Pod) -> None:
        """No snapshot of a pod, or of all of them, verifies any more, and a worker is gone: only the store is left."""
        chance = self.world.random.random()
        found_out = chance < 0.4  # agents throw away what they find damaged
        for victim in self.world.current_pods() if 0.2 < chance < 0.8 else [pod]:
            for snapshot in victim.volume.snapshots:
                snapshot.intact = False
                self.world.invariants.corrupt.add(snapshot.state)
            if found_out:
                victim.volume.snapshots.clear()
                victim.tell_held()
        self._worker(pod)

    def _rendezvous(self, _: Pod) -> None:
        from lockstep_trainer.protocol.events import StoreLost

        for pod in self.world.current_pods():
            pod.tell(StoreLost("killed"))

    def _operator(self, _: Pod) -> None:
        self.world.operator.die()
        self.world.operator = Operator(self.world)
