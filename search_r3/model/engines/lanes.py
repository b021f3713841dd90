"""Slots on several cores: each lane is `Slots` of its own on a thread of its own, at a pace of its own.

One pass over few rows keeps no two cores busy: its products are too small to share. So the rows are dealt out instead,
each to the lane with the fewest, and every lane runs its own passes; none waits for another, which may be reading a
prompt. What a row writes is the same in any lane.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait

from search_r3.model.engines.slots import Slots, Step

Joining = list[tuple[Sequence[int], int, int]]
"""Rows that a lane's next step begins with: tokens, budget, handle of each."""


class Lanes:
    """`Slots` over `count` cores: the same methods, and the same tokens. One thread at a time.

    Args:
        open_lane: makes an empty lane.
        count: of lanes.
        threads: where lanes run, each of its threads on a core of its own.
    """

    def __init__(self, open_lane: Callable[[], Slots], count: int, threads: Executor) -> None:
        self._lanes = [open_lane() for _ in range(count)]
        self._threads = threads
        self._handles = 0
        self._running: dict[Future[list[Step]], int] = {}  # a step under way -> its lane, which is its thread's alone
        self.clear()

    def __len__(self) -> int:
        return len(self._place)

    def clear(self) -> None:
        """Let go of all rows and of their memory."""
        wait(self._running)
        self._running.clear()
        for lane in self._lanes:
            lane.clear()
        self._place: dict[int, int] = {}  # which lane a handle is in
        self._joining: list[Joining] = [[] for _ in self._lanes]
        self._leaving: list[list[int]] = [[] for _ in self._lanes]
        self._names: list[dict[int, int]] = [{} for _ in self._lanes]  # a lane's handle -> ours

    def join(self, rows: Sequence[Sequence[int]], budgets: Sequence[int]) -> list[int]:
        """See `Slots.join`; the rows are prefilled in their lane's next step."""
        handles = list(range(self._handles, self._handles + len(rows)))
        self._handles += len(rows)
        held = [sum(place == lane for place in self._place.values()) for lane in range(len(self._lanes))]
        # The longest first, so that each lane has as much to prefill.
        for row, budget, handle in sorted(zip(rows, budgets, handles, strict=True), key=lambda one: -len(one[0])):
            lane = held.index(min(held))
            held[lane] += 1
            self._place[handle] = lane
            self._joining[lane].append((row, budget, handle))
        return handles

    def step(self) -> list[Step]:
        """A step of each lane that has ended one since, of one lane at least; the others go on. See `Slots.step`.

        If a lane's step raises, so does this, when no lane is under way any more.
        """
        for lane in sorted(set(self._place.values()) - set(self._running.values())):
            joining, self._joining[lane] = self._joining[lane], []
            leaving, self._leaving[lane] = self._leaving[lane], []
            self._running[self._threads.submit(self._step, lane, joining, leaving)] = lane
        ended, _ = wait(self._running, return_when=FIRST_COMPLETED)
        if any(one.exception() is not None for one in ended):
            wait(self._running)
        steps = []
        for one in ended:
            del self._running[one]
            steps += one.result()
        steps = [step for step in steps if step.handle in self._place]  # the others have left in the meantime
        for step in steps:
            if step.done is not None:
                del self._place[step.handle]
        return sorted(steps, key=lambda step: step.handle)

    def leave(self, handles: Sequence[int]) -> None:
        """See `Slots.leave`; a lane that is under way lets go of them in its next step."""
        for handle in handles:
            if (lane := self._place.pop(handle, None)) is not None:
                self._leaving[lane].append(handle)

    def _step(self, lane: int, joining: Joining, leaving: Sequence[int]) -> list[Step]:
        """One lane's step, in a thread."""
        slots, names, gone = self._lanes[lane], self._names[lane], set(leaving)
        joining = [one for one in joining if one[2] not in gone]
        if left := [inner for inner, name in names.items() if name in gone]:
            slots.leave(left)
        if joining:
            rows, budgets, handles = zip(*joining, strict=True)
            names.update(zip(slots.join(rows, budgets), handles, strict=True))
        steps = [Step(names[step.handle], step.token, step.done) for step in slots.step()]
        gone |= {step.handle for step in steps if step.done is not None}
        for inner in [inner for inner, name in names.items() if name in gone]:
            del names[inner]
        return steps
