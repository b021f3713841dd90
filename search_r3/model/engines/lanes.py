"""Slots on several cores: each lane is `Slots` of its own on a thread of its own, and a step is a step of every lane.

One pass over few rows keeps no two cores busy: its products are too small to share. So the rows are dealt out instead,
each to the lane with the fewest, and every lane runs its own pass. What a row writes is the same in any lane.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, wait

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
        self.clear()

    def __len__(self) -> int:
        return len(self._place)

    def clear(self) -> None:
        """Let go of all rows and of their memory."""
        for lane in self._lanes:
            lane.clear()
        self._place: dict[int, int] = {}  # which lane a handle is in
        self._joining: list[Joining] = [[] for _ in self._lanes]
        self._names: list[dict[int, int]] = [{} for _ in self._lanes]  # a lane's handle -> ours

    def join(self, rows: Sequence[Sequence[int]], budgets: Sequence[int]) -> list[int]:
        """See `Slots.join`; the rows are prefilled in the next step."""
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
        """See `Slots.step`. Rows are told of in the order in which they joined."""
        busy = sorted(set(self._place.values()))
        running = [self._threads.submit(self._step, lane) for lane in busy]
        wait(running)  # all of them, also after an error: nobody works on what is cleared then
        steps = [step for one in running for step in one.result()]
        for step in steps:
            if step.done is not None:
                del self._place[step.handle]
        return sorted(steps, key=lambda step: step.handle)

    def leave(self, handles: Sequence[int]) -> None:
        """See `Slots.leave`."""
        gone = set(handles)
        for lane, slots in enumerate(self._lanes):
            self._joining[lane] = [one for one in self._joining[lane] if one[2] not in gone]
            leaving = [inner for inner, name in self._names[lane].items() if name in gone]
            slots.leave(leaving)
            for inner in leaving:
                del self._names[lane][inner]
        for handle in gone:
            self._place.pop(handle, None)

    def _step(self, lane: int) -> list[Step]:
        """One lane's step, in a thread."""
        slots, names = self._lanes[lane], self._names[lane]
        joining, self._joining[lane] = self._joining[lane], []
        if joining:
            rows, budgets, handles = zip(*joining, strict=True)
            names.update(zip(slots.join(rows, budgets), handles, strict=True))
        steps = [Step(names[step.handle], step.token, step.done) for step in slots.step()]
        ended = {step.handle for step in steps if step.done is not None}
        for inner in [inner for inner, name in names.items() if name in ended]:
            del names[inner]
        return steps
