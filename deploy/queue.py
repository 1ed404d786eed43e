"""Those who wait for a replica: their order, and what each keeps from those behind it. Decides nothing.

Walking the queue costs a few comparisons per waiting request, whatever the number of replicas: of one kind of
replica a request that waits claims those with at least so many usable blocks, so the smallest need per kind says all.
"""

import bisect
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deploy.demand import NEVER, blocks_wanted
from deploy.fairness import Shares
from deploy.messages import Demand
from deploy.replica_table import ReplicaTable

SHORT, LONG = "short", "long"


@dataclass(eq=False)
class Waiting:
    """A request in the queue."""

    demand: Demand
    since: float
    kind: str
    """SHORT or LONG."""
    start: float
    """When its turn begins in its tenant's share: virtual time of its class."""
    lead: float
    """It counts as one that came so many seconds earlier. A low priority has a negative lead, which delays a request
    and no more: those that come so much later are behind it. As in vLLM, a lower number is handled earlier."""
    blocks: int
    """The least it needs on any known replica; 0 while none is known."""
    _needs: tuple[int, ...] = ()

    def needs(self, table: ReplicaTable) -> tuple[int, ...]:
        """Blocks it needs on each of `table.kinds`; NEVER where the limits do not allow it."""
        if len(self._needs) < len(table.kinds):
            self._needs = tuple(blocks_wanted(self.demand, kind) for kind in table.kinds)
        return self._needs


@dataclass
class _Line:
    """Those of one class and one lead, by `start`."""

    ahead: float
    """What the lead is worth now, in virtual time. Of all alike, so that it changes nothing between tenants."""
    waiting: list[Waiting]

    def place(self, position: int) -> tuple[float, float]:
        """When that one is due in its class: the lower, the earlier. By the clock while virtual time stands still."""
        waiting = self.waiting[position]
        return waiting.start - self.ahead, waiting.since - waiting.lead


class Queue:
    """Waiting requests, short ones first, each class by when they are due.

    A short request takes little and gives it back soon, so it costs the long ones next to nothing to let it pass,
    while it would wait for a multiple of its own time if blocks went to them first.
    """

    def __init__(self, shares: Mapping[str, Shares]) -> None:
        """`shares`: the virtual time of each class."""
        self.blocks = 0
        """What they need together."""
        self._shares = shares
        self._lines: dict[str, dict[float, _Line]] = {SHORT: {}, LONG: {}}
        """By class and lead; none is empty."""
        self._by_reservation: dict[str, Waiting] = {}
        self.lengths = {SHORT: 0, LONG: 0}
        """How many wait, by class."""

    def __len__(self) -> int:
        return len(self._by_reservation)

    def __iter__(self) -> Iterator[Waiting]:
        for kind in (SHORT, LONG):
            yield from self.of(kind)

    def of(self, kind: str) -> Iterator[Waiting]:
        """One class. The one met last may be removed meanwhile; nothing is copied, as the first few mostly suffice."""
        reached = [(line, 0) for line in self._lines[kind].values()]
        while reached:
            first = 0
            if len(reached) > 1:
                first = min(range(len(reached)), key=lambda i: reached[i][0].place(reached[i][1]))
            line, position = reached[first]
            waiting = line.waiting[position]
            yield waiting
            if position < len(line.waiting) and line.waiting[position] is waiting:
                position += 1
            if position < len(line.waiting):
                reached[first] = (line, position)
            else:
                del reached[first]

    def __contains__(self, reservation: str) -> bool:
        return reservation in self._by_reservation

    def since_before(self, moment: float) -> list[Waiting]:
        """Who has waited since then or longer."""
        return [waiting for waiting in self._by_reservation.values() if waiting.since <= moment]

    def get(self, reservation: str) -> Waiting | None:
        return self._by_reservation.get(reservation)

    def first(self, kind: str) -> Waiting | None:
        """The next of one class."""
        return next(self.of(kind), None)

    def last(self) -> Waiting:
        """Who is due last, whatever its class; somebody waits. Of several the one that came last.

        The classes have a virtual time each, and one of them may be far behind: what counts is how far ahead of its
        own a request is.
        """
        ends: list[tuple[float, float, Waiting]] = []
        for kind, lines in self._lines.items():
            for line in lines.values():
                due, since = line.place(-1)
                ends.append((due - self._shares[kind].virtual, since, line.waiting[-1]))
        return max(ends, key=lambda end: end[:2])[2]

    def add(self, waiting: Waiting) -> None:
        lines = self._lines[waiting.kind]
        if waiting.lead not in lines:
            lines[waiting.lead] = _Line(self._ahead(waiting.kind, waiting.lead), [])
        bisect.insort(lines[waiting.lead].waiting, waiting, key=_start)
        self._by_reservation[waiting.demand.reservation] = waiting
        self.blocks += waiting.blocks
        self.lengths[waiting.kind] += 1

    def remove(self, waiting: Waiting) -> None:
        lines = self._lines[waiting.kind]
        line = lines[waiting.lead].waiting
        position = bisect.bisect_left(line, waiting.start, key=_start)
        while line[position] is not waiting:
            position += 1
        del line[position]
        if not line:
            del lines[waiting.lead]
        del self._by_reservation[waiting.demand.reservation]
        self.blocks -= waiting.blocks
        self.lengths[waiting.kind] -= 1

    def age(self) -> None:
        """Leads are worth what has passed of virtual time lately: see what that is now."""
        for kind, lines in self._lines.items():
            for lead, line in lines.items():
                line.ahead = self._ahead(kind, lead)

    def _ahead(self, kind: str, lead: float) -> float:
        """In virtual time. What comes will pass as what has passed, so a negative lead is worth as much."""
        return lead and math.copysign(self._shares[kind].passed_in(abs(lead)), lead)


def _start(waiting: Waiting) -> float:
    return waiting.start


class Claims:
    """What the waiting requests of one class have claimed so far, of the replicas in `rows`.

    A request that waits claims every replica on which it could ever fit: nobody behind it in its class may take
    headroom there, or a large request would starve behind smaller ones.
    """

    def __init__(self, table: ReplicaTable, rows: slice) -> None:
        self._kind = table.kind[rows]
        self._usable = table.usable[rows]
        self._smallest_needs = (NEVER,) * len(table.kinds)
        self.cover_all = len(self._kind) == 0

    def leave_any_to(self, needs: tuple[int, ...]) -> bool:
        """Is there a replica, full or not, that a request of these needs may take?"""
        return not self.cover_all and any(n < claimed for n, claimed in zip(needs, self._smallest_needs, strict=True))

    def open(self) -> NDArray[np.bool_]:
        """Which of the rows nobody has claimed."""
        return self._usable < np.array(self._smallest_needs)[self._kind]

    def add(self, needs: tuple[int, ...]) -> None:
        smallest = tuple(map(min, needs, self._smallest_needs))
        if smallest != self._smallest_needs:
            self._smallest_needs = smallest
            self.cover_all = not self.open().any()
