"""Who is let in, when, and where: the coordinator's decisions, and the queue of those who wait.

Owns the queue (order, deadline, bypass) and the counts of what was decided. The ledger holds the blocks,
`demand.py` says what a request needs, `placement.py` chooses among the replicas that fit. No Ray, no clock,
no threads: the same code runs in the actor, in the tests and in the simulation.
"""

import bisect
import math
import random
from collections import Counter, deque
from dataclasses import dataclass, field

from deploy.demand import blocks_needed, can_ever_fit, refuse_if_never
from deploy.ledger import Ledger, ReplicaSnapshot
from deploy.messages import CapacityReport, Decision, Demand, Placement, Refusal
from deploy.placement import POLICIES, Candidate, Policy
from deploy.settings import CoordinatorSettings

REJECTION_REASONS = ("over_max_model_len", "over_kv_pool", "queue_full", "queue_deadline", "no_replica")
SHORT, LONG = "short", "long"

WAIT_BUCKETS_SECONDS = (0.001, 0.01, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
RELEASE_WINDOW_SECONDS = 30.0
LONGEST_RETRY_AFTER_SECONDS = 120


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
        self._queue: list[_Waiting] = []
        self._releases = _ReleaseRate()
        self._placements: dict[str, Counter[str]] = {}
        self._rejections: Counter[str] = Counter()
        self._admissions = 0
        self._waits = {SHORT: WaitHistogram(), LONG: WaitHistogram()}

    def submit(self, demand: Demand, now: float) -> Decision | None:
        """Place or refuse a request now, or queue it (None): its decision then comes from another call.

        A reservation id is used once; raises ValueError for one that is booked or queued already.
        """
        if demand.reservation in self._ledger or self._is_queued(demand.reservation):
            raise ValueError(f"reservation {demand.reservation} is in use: submit each request under a new id")
        refusal = self._refuse_if_never(demand)
        if refusal is not None:
            return refusal
        waiting = self._waiting(demand, now)
        bisect.insort(self._queue, waiting, key=_Waiting.order)
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
            for waiting in list(self._queue):
                refusal = self._refuse_if_never(waiting.demand)
                if refusal is not None:
                    self._queue.remove(waiting)
                    decisions.append(refusal)
        return decisions + self._serve(now)

    def release(self, reservation: str, now: float) -> list[Decision]:
        """The request has ended in whatever way, placed or still queued. Idempotent.

        Its blocks count as free only when its replica reports them so.
        """
        if self._ledger.release(reservation, now):
            return self._serve(now)
        for waiting in self._queue:
            if waiting.demand.reservation == reservation:
                self._queue.remove(waiting)
                return self._serve(now)
        return []

    def remove_replica(self, replica: str, now: float) -> list[Decision]:
        """The replica is gone: its bookings end, its series disappear, late reports of it are ignored."""
        self._ledger.remove(replica, now)
        self._placements.pop(replica, None)
        return self._serve(now)

    def tick(self, now: float) -> list[Decision]:
        """What time alone changes: leases, deadlines. Call it a few times a second."""
        self._ledger.expire(now)
        decisions: list[Decision] = list(self._serve(now))
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
            queued_blocks=sum(waiting.blocks for waiting in self._queue),
            waits={kind: histogram.copy() for kind, histogram in self._waits.items()},
            admissions=self._admissions,
            placements={replica: dict(counts) for replica, counts in self._placements.items()},
            rejections={reason: self._rejections[reason] for reason in REJECTION_REASONS},
            lease_expirations=self._ledger.lease_expirations,
            reports_ignored=self._ledger.reports_ignored,
            released_blocks_per_second=self._releases.per_second(now),
        )

    def _is_queued(self, reservation: str) -> bool:
        return any(waiting.demand.reservation == reservation for waiting in self._queue)

    # -- the queue ---------------------------------------------------------------------------------------

    def _serve(self, now: float, only: "_Waiting | None" = None) -> list[Decision]:
        """Place whoever can be placed, in order; with `only` at most that one.

        A request that does not fit waits for every replica on which it could ever fit: nobody behind it in
        its class may take headroom there, or a large request would starve behind smaller ones. The classes
        do not wait for each other, with one exception: when a long request has waited for half of its
        deadline, the replica that is closest to fitting it takes no short ones from behind it, unless it is
        the only one.
        """
        self._releases.observe(self._ledger.ended_blocks, now)
        decisions: list[Decision] = []
        claimed: dict[str, set[str]] = {SHORT: set(), LONG: set()}
        set_aside = False
        for waiting in list(self._queue):
            taken = claimed[waiting.kind]
            if len(taken) == len(self._ledger.replicas) and waiting is not only:
                continue
            if only is None or waiting is only:
                placement = self._place(waiting, taken, now)
                if placement is not None:
                    decisions.append(placement)
                    continue
                if waiting is only:
                    break
            taken |= self._could_fit(waiting.demand)
            half_deadline = self._settings.queue_deadline_seconds / 2
            if waiting.kind == LONG and not set_aside and now - waiting.since >= half_deadline:
                set_aside = True
                claimed[SHORT] |= self._closest(self._could_fit(waiting.demand), now)
        return decisions

    def _place(self, waiting: "_Waiting", taken: set[str], now: float) -> Placement | None:
        demand = waiting.demand
        candidates = []
        for replica in self._ledger.fresh(now):
            headroom = replica.headroom_blocks
            if headroom <= 0 or replica.report.replica in taken:
                continue
            need = blocks_needed(demand, replica.report.limits, replica.report.engine)
            if need <= headroom and demand.total_tokens <= replica.report.limits.max_model_len:
                candidates.append(Candidate(replica.report.replica, headroom, need, replica.requests))
        if not candidates:
            return None
        name = self._settings.short_placement if waiting.kind == SHORT else self._settings.long_placement
        policy: Policy = POLICIES[name]
        chosen = policy(candidates, self._rng)
        self._ledger.book(demand.reservation, chosen.replica, chosen.need_blocks, now)
        self._queue.remove(waiting)
        self._admissions += 1
        self._placements[chosen.replica][name] += 1
        self._waits[waiting.kind].observe(now - waiting.since)
        return Placement(demand.reservation, chosen.replica, name)

    def _could_fit(self, demand: Demand) -> set[str]:
        """Replicas that could take the request if they were empty."""
        watermark = self._settings.watermark_blocks
        return {
            name
            for name, replica in self._ledger.replicas.items()
            if can_ever_fit(demand, replica.report.limits, replica.report.engine, watermark)
        }

    def _closest(self, replicas: set[str], now: float) -> set[str]:
        """The fresh one of most headroom; none where it would be the only replica that takes requests."""
        fresh = list(self._ledger.fresh(now))
        able = [replica for replica in fresh if replica.report.replica in replicas]
        if len(fresh) < 2 or not able:
            return set()
        return {max(able, key=lambda replica: replica.headroom_blocks).report.replica}

    def _waiting(self, demand: Demand, now: float) -> "_Waiting":
        is_short = demand.total_tokens * demand.sequences <= self._settings.short_request_tokens
        needs = [
            blocks_needed(demand, replica.report.limits, replica.report.engine)
            for replica in self._ledger.replicas.values()
        ]
        return _Waiting(
            demand=demand,
            since=now,
            kind=SHORT if is_short else LONG,
            rank=demand.priority * self._settings.aging_seconds + now,
            blocks=min(needs, default=0),
        )

    # -- refusals ----------------------------------------------------------------------------------------

    def _refuse_if_never(self, demand: Demand) -> Refusal | None:
        known = [(r.report.limits, r.report.engine) for r in self._ledger.replicas.values()]
        refusal = refuse_if_never(demand, known, self._settings.watermark_blocks)
        if refusal is not None:
            self._rejections[refusal.reason] += 1
        return refusal

    def _refuse_late(self, waiting: "_Waiting", now: float) -> Refusal:
        waited = f"The request waited for {now - waiting.since:.0f} s (queue_deadline_seconds)"
        if any(True for _ in self._ledger.fresh(now)):
            reason = "queue_deadline"
            message = f"{waited} and {waiting.blocks} KV blocks did not become free: send it again later."
        else:
            reason = "no_replica"
            message = f"{waited} and no replica has reported: the fleet is starting or has lost its replicas."
        return self._refuse(waiting, status=503, reason=reason, message=message, now=now)

    def _refuse(self, waiting: "_Waiting", status: int, reason: str, message: str, now: float) -> Refusal:
        self._rejections[reason] += 1
        ahead = sum(other.blocks for other in self._queue)
        return Refusal(
            waiting.demand.reservation,
            status=status,
            reason=reason,
            message=message,
            retry_after_seconds=self._retry_after(ahead + waiting.blocks, now),
        )

    def _retry_after(self, blocks: int, now: float) -> int:
        """Seconds until so many blocks are released at the pace observed; if none was, the deadline."""
        rate = self._releases.per_second(now)
        seconds = blocks / rate if rate > 0 else self._settings.queue_deadline_seconds
        return min(LONGEST_RETRY_AFTER_SECONDS, max(1, math.ceil(seconds)))


@dataclass(frozen=True, eq=False)
class _Waiting:
    """A request in the queue."""

    demand: Demand
    since: float
    kind: str
    rank: float
    """Its place: the lower, the earlier. Every step of priority is worth `aging_seconds` of waiting, so that
    a low priority delays a request but never starves it. As in vLLM, a lower number is handled earlier."""
    blocks: int
    """The least it needs on any known replica; 0 while none is known."""

    def order(self) -> float:
        return self.rank


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
