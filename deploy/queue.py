"""Those who wait for a replica: their order, and what each keeps from those behind it. Decides nothing.

Walking the queue costs a few comparisons per waiting request, whatever the number of replicas: of one kind of
replica a request that waits claims those with at least so many usable blocks, so the smallest need per kind says all.
"""

import bisect
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deploy.demand import NEVER, blocks_wanted
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
    begin: float
    """When its turn begins in its tenant's share. Every step of priority is worth `aging_seconds` of waiting, so that
    a low priority delays a request but never starves it. As in vLLM, a lower number is handled earlier."""
    rank: float
    """When it is due: the lower, the earlier within its class."""
    blocks: int
    """The least it needs on any known replica; 0 while none is known."""
    _needs: tuple[int, ...] = ()

    def place(self) -> tuple[bool, float]:
        return self.kind == LONG, self.rank

    def needs(self, table: ReplicaTable) -> tuple[int, ...]:
        """Blocks it needs on each of `table.kinds`; NEVER where the limits do not allow it."""
        if len(self._needs) < len(table.kinds):
            self._needs = tuple(blocks_wanted(self.demand, kind) for kind in table.kinds)
        return self._needs


class Queue:
    """Waiting requests, short ones first, each class by rank.

    A short request takes little and gives it back soon, so it costs the long ones next to nothing to let it pass,
    while it would wait for a multiple of its own time if blocks went to them first.
    """

    def __init__(self) -> None:
        self.blocks = 0
        """What they need together."""
        self._ranked: list[Waiting] = []
        self._by_reservation: dict[str, Waiting] = {}
        """In order of arrival."""
        self.lengths = {SHORT: 0, LONG: 0}
        """How many wait, by class."""

    def __len__(self) -> int:
        return len(self._ranked)

    def __iter__(self) -> Iterator[Waiting]:
        for kind in (SHORT, LONG):
            yield from self.of(kind)

    def of(self, kind: str) -> Iterator[Waiting]:
        """One class. The one met last may be removed meanwhile; nothing is copied, as the first few mostly suffice."""
        position = 0 if kind == SHORT else self.lengths[SHORT]
        while position < len(self._ranked) and self._ranked[position].kind == kind:
            waiting = self._ranked[position]
            yield waiting
            if position < len(self._ranked) and self._ranked[position] is waiting:
                position += 1

    def __contains__(self, reservation: str) -> bool:
        return reservation in self._by_reservation

    def since_before(self, moment: float) -> list[Waiting]:
        """Who has waited since then or longer."""
        return list(itertools.takewhile(lambda waiting: waiting.since <= moment, self._by_reservation.values()))

    def get(self, reservation: str) -> Waiting | None:
        return self._by_reservation.get(reservation)

    def first(self, kind: str) -> Waiting | None:
        """The next of one class."""
        position = 0 if kind == SHORT else self.lengths[SHORT]
        return self._ranked[position] if self.lengths[kind] else None

    def last(self) -> Waiting:
        """Who is due last, whatever its class; somebody waits. Of several the one that came last."""
        ends = {self.lengths[SHORT] - 1, len(self._ranked) - 1} - {-1}
        return max((self._ranked[end] for end in sorted(ends, reverse=True)), key=lambda waiting: waiting.rank)

    def add(self, waiting: Waiting) -> None:
        bisect.insort(self._ranked, waiting, key=Waiting.place)
        self._by_reservation[waiting.demand.reservation] = waiting
        self.blocks += waiting.blocks
        self.lengths[waiting.kind] += 1

    def remove(self, waiting: Waiting) -> None:
        position = bisect.bisect_left(self._ranked, waiting.place(), key=Waiting.place)
        while self._ranked[position] is not waiting:
            position += 1
        del self._ranked[position]
        del self._by_reservation[waiting.demand.reservation]
        self.blocks -= waiting.blocks
        self.lengths[waiting.kind] -= 1


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
