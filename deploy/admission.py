"""Who is let in, when, and where: the coordinator's decisions, and the queue of those who wait.

Owns when the queue is served, its deadline and bypass, and the counts of what was decided. The ledger holds the
blocks, `demand.py` says what a request needs, `queue.py` who is next, `placement.py` chooses among the replicas that
fit. No Ray, no clock, no threads: the same code runs in the actor, in the tests and in the simulation.
"""

import bisect
import math
import random
from collections import Counter, deque
from dataclasses import dataclass, field

import numpy as np

from deploy.demand import blocks_needed, refuse_if_never
from deploy.ledger import EVERY_ROW, Ledger, ReplicaSnapshot
from deploy.messages import CapacityReport, Decision, Demand, Placement, Refusal
from deploy.placement import POLICIES, Candidates, Policy
from deploy.queue import LONG, SHORT, Claims, Queue, Waiting
from deploy.settings import CoordinatorSettings

REJECTION_REASONS = ("over_max_model_len", "over_kv_pool", "queue_full", "queue_deadline", "no_replica")

WAIT_BUCKETS_SECONDS = (0.001, 0.01, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
RELEASE_WINDOW_SECONDS = 30.0
LONGEST_RETRY_AFTER_SECONDS = 120
LEASE_CHECK_SECONDS = 1.0


@dataclass
class WaitHistogram:
    """How long the requests of one class waited for their place, in Prometheus' buckets."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(WAIT_BUCKETS_SECONDS) + 1))
    """Per bucket, not cumulative; the last one is for longer waits than any bucket's."""
    sum_seconds: float = 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect.bisect_left(WAIT_BUCKETS_SECONDS, seconds)] += 1
        self.sum_seconds += seconds

    def copy(self) -> "WaitHistogram":
        return WaitHistogram(list(self.counts), self.sum_seconds)


@dataclass(frozen=True)
class FleetSnapshot:
    """The fleet at one moment, for metrics, `trifleet status` and tests. Counts run from the start."""

    replicas: tuple[ReplicaSnapshot, ...]
    queue_length: dict[str, int]
    """Waiting requests by class, "short" and "long"."""
    queued_blocks: int
    """What the waiting requests need together."""
    waits: dict[str, WaitHistogram]
    """Time from submission to placement by class; 0 seconds for those who did not wait."""
    admissions: int
    placements: dict[str, dict[str, int]]
    """Replica -> reason -> placements."""
    rejections: dict[str, int]
    """Reason -> refusals; every reason of REJECTION_REASONS is there."""
    lease_expirations: int
    reports_ignored: int
    released_blocks_per_second: float
    """The pace at which reservations end; Retry-After is computed from it."""


class Admission:
    """The coordinator's core. `now` is in seconds and never goes back; every method returns at once."""

    def __init__(self, settings: CoordinatorSettings, rng: random.Random | None = None) -> None:
        self._settings = settings
        self._rng = rng or random.Random()
        self._ledger = Ledger(settings.lease_seconds, settings.stale_report_seconds, settings.watermark_blocks)
        self._queue = Queue()
        self._releases = _ReleaseRate()
        self._leases_checked_at = -math.inf
        self._placements: dict[str, Counter[str]] = {}
        self._rejections: Counter[str] = Counter()
        self._admissions = 0
        self._waits = {SHORT: WaitHistogram(), LONG: WaitHistogram()}

    def submit(self, demand: Demand, now: float) -> Decision | None:
        """Place or refuse a request now, or queue it (None): its decision then comes from another call.

        A reservation id is used once; raises ValueError for one that is booked or queued already.
        """
        if demand.reservation in self._ledger or demand.reservation in self._queue:
            raise ValueError(f"reservation {demand.reservation} is in use: submit each request under a new id")
        refusal = self._refuse_if_never(demand)
        if refusal is not None:
            return refusal
        waiting = self._waiting(demand, now)
        self._queue.add(waiting)
        placed = self._serve(now, only=waiting)
        if placed:
            return placed[0]
        if len(self._queue) > self._settings.queue_length:
            self._queue.remove(waiting)
            return self._refuse(
                waiting,
                status=429,
                reason="queue_full",
                message=f"All replicas are full and {len(self._queue)} requests wait already (queue_length): "
                "send the request again later.",
                now=now,
            )
        return None

    def observe(self, report: CapacityReport, now: float) -> list[Decision]:
        """Take a replica's report. A new engine may bring limits under which a waiting request never fits."""
        known = self._ledger.replicas.get(report.replica)
        is_new = known is None or known.report.epoch != report.epoch
        is_taken = self._ledger.observe(report, now)
        decisions: list[Decision] = []
        if is_taken and report.replica not in self._placements:
            # Zeros from the start: a series that begins with its first placement hides that rate.
            reasons = (self._settings.short_placement, self._settings.long_placement)
            self._placements[report.replica] = Counter(dict.fromkeys(reasons, 0))
        if is_new and is_taken:
            for waiting in self._queue:
                refusal = self._refuse_if_never(waiting.demand)
                if refusal is not None:
                    self._queue.remove(waiting)
                    decisions.append(refusal)
        return decisions + (self._serve(now) if decisions else self._serve_changed(report.replica, now))

    def release(self, reservation: str, now: float) -> list[Decision]:
        """The request has ended in whatever way, placed or still queued. Idempotent.

        Its blocks count as free only when its replica reports them so.
        """
        replica = self._ledger.replica_of(reservation)
        if replica is not None:
            self._ledger.release(reservation, now)
            return self._serve_changed(replica, now)
        waiting = self._queue.get(reservation)
        if waiting is not None:
            self._queue.remove(waiting)
            return self._serve(now)
        return []

    def remove_replica(self, replica: str, now: float) -> list[Decision]:
        """The replica is gone: its bookings end, its series disappear, late reports of it are ignored."""
        self._ledger.remove(replica, now)
        self._placements.pop(replica, None)
        return self._serve(now)

    def silent(self, now: float, seconds: float) -> list[str]:
        """Replicas that nothing was heard of for longer than that."""
        table = self._ledger.table
        return [table.names[row] for row in np.flatnonzero(now - table.heard_at > seconds)]

    def tick(self, now: float) -> list[Decision]:
        """What time alone changes: leases, deadlines. Call it a few times a second."""
        if now - self._leases_checked_at >= LEASE_CHECK_SECONDS:
            self._leases_checked_at = now
            self._ledger.expire(now)
        decisions = self._serve(now)
        deadline = self._settings.queue_deadline_seconds
        for waiting in [w for w in self._queue if now - w.since >= deadline]:
            self._queue.remove(waiting)
            decisions.append(self._refuse_late(waiting, now))
        return decisions

    def snapshot(self, now: float) -> FleetSnapshot:
        lengths = Counter(waiting.kind for waiting in self._queue)
        self._releases.observe(self._ledger.ended_blocks, now)
        return FleetSnapshot(
            replicas=self._ledger.snapshot(now),
            queue_length={kind: lengths[kind] for kind in (SHORT, LONG)},
            queued_blocks=self._queue.blocks,
            waits={kind: histogram.copy() for kind, histogram in self._waits.items()},
            admissions=self._admissions,
            placements={replica: dict(counts) for replica, counts in self._placements.items()},
            rejections={reason: self._rejections[reason] for reason in REJECTION_REASONS},
            lease_expirations=self._ledger.lease_expirations,
            reports_ignored=self._ledger.reports_ignored,
            released_blocks_per_second=self._releases.per_second(now),
        )

    # -- the queue ---------------------------------------------------------------------------------------

    def _serve(self, now: float, rows: slice = EVERY_ROW, only: Waiting | None = None) -> list[Decision]:
        """Place whoever can be placed, in order; with `only` at most that one.

        `rows` are the replicas that may have gained headroom since the last call; on the others nobody who waits
        can be placed. A request that does not fit waits for every replica on which it could ever fit (`Claims`).
        The classes do not wait for each other, with one exception: when a long request has waited for half of its
        deadline, the replica that is closest to fitting it takes no short ones from behind it, unless it is the
        only one.
        """
        self._releases.observe(self._ledger.ended_blocks, now)
        table = self._ledger.table
        decisions: list[Decision] = []
        claims = {kind: Claims(table, rows) for kind in (SHORT, LONG)} if len(self._queue) else {}
        half_deadline = self._settings.queue_deadline_seconds / 2
        closed_to_short: int | None = None
        for waiting in self._queue:
            claimed = claims[waiting.kind]
            needs = waiting.needs(table)
            if (only is None or waiting is only) and claimed.leave_any_to(needs):
                closed = closed_to_short if waiting.kind == SHORT else None
                placement = self._place(waiting, rows, claimed, closed, now)
                if placement is not None:
                    decisions.append(placement)
                    continue
            if waiting is only:
                break
            if waiting.kind == LONG and closed_to_short is None and now - waiting.since >= half_deadline:
                closed_to_short = self._closest(needs, now)
            claimed.add(needs)
            if all(one.cover_all for one in claims.values()):
                break
        return decisions

    def _serve_changed(self, replica: str, now: float) -> list[Decision]:
        """Place whoever can be placed now that one replica has changed: cheap while nobody can."""
        row = self._ledger.table.row_of.get(replica)
        decisions = [] if row is None else self._serve(now, slice(row, row + 1))
        # Who was placed leaves its claims on all other replicas to those behind it.
        return decisions + self._serve(now) if decisions else []

    def _place(
        self, waiting: Waiting, rows: slice, claimed: Claims, closed: int | None, now: float
    ) -> Placement | None:
        table = self._ledger.table
        need = np.array(waiting.needs(table))[table.kind[rows]]
        headroom = table.headroom[rows]
        fits = headroom >= need
        if not fits.any():
            return None
        fits &= self._ledger.fresh(now, rows) & claimed.open()
        first_row = rows.start or 0
        if closed is not None and 0 <= closed - first_row < len(fits):
            fits[closed - first_row] = False
        found = np.flatnonzero(fits)
        if not len(found):
            return None
        candidates = Candidates(headroom[found], need[found], table.requests[rows][found])
        name = self._settings.short_placement if waiting.kind == SHORT else self._settings.long_placement
        policy: Policy = POLICIES[name]
        chosen = policy(candidates, self._rng)
        replica = table.names[first_row + found[chosen]]
        self._ledger.book(waiting.demand.reservation, replica, int(candidates.need_blocks[chosen]), now)
        self._queue.remove(waiting)
        self._admissions += 1
        self._placements[replica][name] += 1
        self._waits[waiting.kind].observe(now - waiting.since)
        return Placement(waiting.demand.reservation, replica, name)

    def _closest(self, needs: tuple[int, ...], now: float) -> int | None:
        """The row of most headroom that could ever take it; None where it is the only one that takes requests."""
        table = self._ledger.table
        fresh = self._ledger.fresh(now)
        able = np.flatnonzero(fresh & (table.usable >= np.array(needs)[table.kind]))
        if fresh.sum() < 2 or not len(able):
            return None
        return int(able[table.headroom[able].argmax()])

    def _waiting(self, demand: Demand, now: float) -> Waiting:
        is_short = demand.total_tokens * demand.sequences <= self._settings.short_request_tokens
        return Waiting(
            demand=demand,
            since=now,
            kind=SHORT if is_short else LONG,
            rank=demand.priority * self._settings.aging_seconds + now,
            blocks=min((blocks_needed(demand, kind) for kind, _ in self._ledger.table.largest), default=0),
        )

    # -- refusals ----------------------------------------------------------------------------------------

    def _refuse_if_never(self, demand: Demand) -> Refusal | None:
        refusal = refuse_if_never(demand, self._ledger.table.largest)
        if refusal is not None:
            self._rejections[refusal.reason] += 1
        return refusal

    def _refuse_late(self, waiting: Waiting, now: float) -> Refusal:
        waited = f"The request waited for {now - waiting.since:.0f} s (queue_deadline_seconds)"
        if self._ledger.fresh(now).any():
            reason = "queue_deadline"
            message = f"{waited} and {waiting.blocks} KV blocks did not become free: send it again later."
        else:
            reason = "no_replica"
            message = f"{waited} and no replica has reported: the fleet is starting or has lost its replicas."
        return self._refuse(waiting, status=503, reason=reason, message=message, now=now)

    def _refuse(self, waiting: Waiting, status: int, reason: str, message: str, now: float) -> Refusal:
        self._rejections[reason] += 1
        return Refusal(
            waiting.demand.reservation,
            status=status,
            reason=reason,
            message=message,
            retry_after_seconds=self._retry_after(self._queue.blocks + waiting.blocks, now),
        )

    def _retry_after(self, blocks: int, now: float) -> int:
        """Seconds until so many blocks are released at the pace observed; if none was, the deadline."""
        rate = self._releases.per_second(now)
        seconds = blocks / rate if rate > 0 else self._settings.queue_deadline_seconds
        return min(LONGEST_RETRY_AFTER_SECONDS, max(1, math.ceil(seconds)))


class _ReleaseRate:
    """Blocks per second at which bookings ended, over the last RELEASE_WINDOW_SECONDS."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int]] = deque()

    def observe(self, ended_blocks: int, now: float) -> None:
        """`ended_blocks` counts from the start."""
        if not self._samples or self._samples[-1][1] != ended_blocks:
            self._samples.append((now, ended_blocks))
        # The sample before the window stays: it is the count at the window's begin.
        while len(self._samples) > 1 and self._samples[1][0] <= now - RELEASE_WINDOW_SECONDS:
            self._samples.popleft()

    def per_second(self, now: float) -> float:
        if not self._samples:
            return 0.0
        begin = max(self._samples[0][0], now - RELEASE_WINDOW_SECONDS)
        released = self._samples[-1][1] - self._samples[0][1]
        return released / max(1.0, now - begin)
