"""Fair share of the queue: every tenant gets its share of the fleet's block-seconds while requests wait.

Start-time fair queueing (Goyal, Vin and Cheng, 1996) over block-seconds: a request is charged to its tenant when it is
submitted, with what such requests were seen to take, and the charge is corrected when the replica tells what it
really took. Virtual time runs with the clock, but never past the first in the queue, so a tenant that sends one
request does not wait behind another's thousand, and one that used an idle fleet owes nothing for it.

    capacity 10 blocks, every request 10 block-seconds, tenant A (share 1) sends four, then B (share 2) two:

    A    start 0   1   2   3            one second of the whole fleet each
    B    start 0  0.5                   half of that: its share is double
    order: A0 B0 B0.5 A1 A2 A3

While requests wait, virtual time is slower than the clock: ten times where ten tenants of share 1 have more than the
fleet serves. So what is worth some seconds of waiting is worth the virtual time of the last so many seconds
(`passed_in`), which is all that who came at their end is behind who came at their beginning.
"""

import bisect
from collections import deque
from dataclasses import dataclass

# What a request takes per block of its bound until one has ended: a guess, gone with the first that ends.
FIRST_SECONDS_PER_BLOCK = 5.0
# How quickly the means follow: about the last twenty requests.
_WEIGHT = 0.05
REMEMBERED_FLOWS = 1000
# Of requests that ended last: one that comes back does so within a second or two.
REMEMBERED_ENDS = 1000
# Virtual time is remembered by the second, for longer than a request waits.
_MEMORY_SECONDS = 1.0
_MEMORIES = 3600

Flow = tuple[str, int]
"""A tenant and a priority: a tenant's own urgent requests do not wait behind its others."""


@dataclass(frozen=True)
class _Charge:
    """What one request was booked to its tenant with, until its end is known."""

    flow: Flow
    share: float
    start: float
    """Its place in virtual time, in seconds of the whole fleet."""
    bound_blocks: int
    block_seconds: float
    """Expected."""


class Shares:
    """Virtual time and what each flow has been charged. `capacity` is in blocks, of the whole fleet."""

    def __init__(self) -> None:
        self.charges: dict[str, _Charge] = {}
        """By reservation, until settled."""
        self.of_tenant: dict[str, set[str]] = {}
        """Tenant -> its reservations of `charges`."""
        self._settled: dict[str, _Charge] = {}
        """Of those that ended last, the latest last: a request that comes back may have counted as ended."""
        self.virtual = 0.0
        self._clock: float | None = None
        self._past: deque[tuple[float, float]] = deque(maxlen=_MEMORIES)
        """Clock and virtual time as they were."""
        self._paid_until: dict[Flow, float] = {}
        self._ended = 0
        self._seconds_per_block = FIRST_SECONDS_PER_BLOCK
        """Of all requests: what is expected of a flow of which nothing is known."""
        self._of_flow: dict[Flow, float] = {}
        """Of the flow's own requests, which may be much longer or shorter than others'."""

    def charge(self, reservation: str, flow: Flow, share: float, bound_blocks: int, capacity: int) -> float:
        """Book a request of the flow behind those that it has in virtual time already: when its turn begins."""
        start = max(self.virtual, self._paid_until.get(flow, 0.0))
        expected = bound_blocks * self._of_flow.get(flow, self._seconds_per_block)
        self._book(reservation, _Charge(flow, share, start, bound_blocks, expected), capacity)
        return start

    def charge_again(self, reservation: str, former: str, capacity: int) -> float | None:
        """The request that was booked as `former` goes on under another reservation: when its turn began. None where
        there was no charge, or too long ago."""
        self.settle(former, 0.0, capacity)
        charge = self._settled.pop(former, None)
        if charge is None:
            return None
        self._book(reservation, charge, capacity)
        return charge.start

    def _book(self, reservation: str, charge: _Charge, capacity: int) -> None:
        paid = max(charge.start, self._paid_until.get(charge.flow, 0.0))
        self._paid_until[charge.flow] = paid + _fleet_seconds(charge.block_seconds, charge.share, capacity)
        self.charges[reservation] = charge
        self.of_tenant.setdefault(charge.flow[0], set()).add(reservation)

    def settle(self, reservation: str, block_seconds: float, capacity: int) -> None:
        """The request has ended and took so much: correct its flow, and what is expected of the next ones.

        A request that was never placed took nothing. Nothing happens where there is no charge.
        """
        charge = self.charges.pop(reservation, None)
        if charge is None:
            return
        self._settled[reservation] = charge
        if len(self._settled) > REMEMBERED_ENDS:
            del self._settled[next(iter(self._settled))]
        tenant = charge.flow[0]
        self.of_tenant[tenant].remove(reservation)
        if not self.of_tenant[tenant]:
            del self.of_tenant[tenant]
        difference = _fleet_seconds(block_seconds - charge.block_seconds, charge.share, capacity)
        if charge.flow in self._paid_until:
            self._paid_until[charge.flow] += difference
        if block_seconds > 0 and charge.bound_blocks:
            seconds = block_seconds / charge.bound_blocks
            of_flow = self._of_flow.get(charge.flow, seconds)
            self._of_flow[charge.flow] = of_flow + _WEIGHT * (seconds - of_flow)
            self._ended += 1
            self._seconds_per_block += max(_WEIGHT, 1 / self._ended) * (seconds - self._seconds_per_block)

    def placed(self, reservation: str) -> None:
        """Whoever comes new starts no earlier than who was served last."""
        charge = self.charges.get(reservation)
        if charge is not None:  # else a report has called it finished already
            self.virtual = max(self.virtual, charge.start)

    def advance(self, now: float, first: float | None) -> None:
        """Let virtual time run to `now`, but not past `first`, the earliest place in the queue.

        Forgets flows that owe nothing any more.
        """
        if self._clock is None:
            self.virtual = self._clock = now
            self._past.append((now, now))
            return
        passed, self._clock = now - self._clock, now
        at_most = self.virtual + passed
        self.virtual = at_most if first is None else max(self.virtual, min(at_most, first))
        if now - self._past[-1][0] >= _MEMORY_SECONDS:
            self._past.append((now, self.virtual))
            self._paid_until = {flow: until for flow, until in self._paid_until.items() if until > self.virtual}
            if len(self._of_flow) > REMEMBERED_FLOWS:
                self._of_flow = {flow: mean for flow, mean in self._of_flow.items() if flow in self._paid_until}

    def passed_in(self, seconds: float) -> float:
        """Virtual time of the last so many, more than 0; before the first request it went with the clock."""
        assert self._clock is not None, "advance it first"
        moment = self._clock - seconds
        after = bisect.bisect(self._past, moment, key=_clock_of)
        until, ended = self._past[after] if after < len(self._past) else (self._clock, self.virtual)
        if after == 0:
            return self.virtual - (ended - (until - moment))
        before, began = self._past[after - 1]
        return self.virtual - (began + (ended - began) * (moment - before) / (until - before))


def _clock_of(point: tuple[float, float]) -> float:
    return point[0]


def _fleet_seconds(block_seconds: float, share: float, capacity: int) -> float:
    """Seconds for which so many block-seconds would take the whole fleet, stretched by a small share."""
    return block_seconds / share / capacity if capacity else 0.0
