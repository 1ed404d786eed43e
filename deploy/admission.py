"""Who is let in, when, and where: the coordinator's decisions, and the queue of those who wait.

Owns when the queue is served, its deadline and bypass, and the counts of what was decided. The ledger holds the
blocks, `demand.py` says what a request needs, `queue.py` who is next, `fairness.py` gives every tenant its share,
`placement.py` chooses among the replicas that fit. No Ray, no clock, no threads: the same code runs in the actor, in
the tests and in the simulation.
"""

import math
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from deploy.affinity import PrefixIndex
from deploy.demand import blocks_needed, refuse_if_never
from deploy.fairness import Shares
from deploy.ledger import EVERY_ROW, Ledger
from deploy.messages import CapacityReport, Decision, Demand, FleetLoad, Placement, Refusal, TierUsage
from deploy.placement import POLICIES, Candidates, Policy
from deploy.queue import LONG, SHORT, Claims, Queue, Waiting
from deploy.release_rate import ReleaseRate
from deploy.settings import CoordinatorSettings
from deploy.snapshot import REJECTION_REASONS, FleetSnapshot, TierCounts, TierSnapshot
from deploy.tiers import Tier, with_default
from deploy.usage import UsageBook
from replicas.turnstile import Turnstile, too_many_at_once

LEASE_CHECK_SECONDS = 1.0
# For so long a request keeps away from the replica that failed it. If that one reports after that it lives, and may be
# the only one.
AVOID_SECONDS = 3.0


class Admission:
    """The coordinator's core. `now` is in seconds and never goes back; every method returns at once."""

    def __init__(
        self,
        settings: CoordinatorSettings,
        rng: random.Random | None = None,
        tiers: Mapping[str, Tier] | None = None,
    ) -> None:
        self._settings = settings
        self._tiers = with_default(tiers or {})
        self._rng = rng or random.Random()
        self._ledger = Ledger(
            settings.lease_seconds,
            settings.stale_report_seconds,
            settings.watermark_blocks,
            settings.growth_quantile,
        )
        # A class of its own virtual time each: the classes do not wait for each other.
        self._shares = {SHORT: Shares(), LONG: Shares()}
        self._queue = Queue(self._shares)
        self._displaced: list[Refusal] = []
        """Of those who had to leave a full queue, until the next `tick` tells them."""
        self._turnstile = Turnstile()
        self._releases = ReleaseRate()
        self._leases_checked_at = -math.inf
        self._kept_free = ("", "")
        """The reservation that has waited long, and the replica set aside for it."""
        self._placements: dict[str, Counter[str]] = {}
        self._counts = {tier: TierCounts() for tier in self._tiers}
        self._usage = UsageBook()
        self._prefixes = PrefixIndex()
        self._retries = 0

    def submit(self, demand: Demand, now: float) -> Decision | None:
        """Place or refuse a request now, or queue it (None): its decision then comes from another call.

        When the queue is full, whoever is due last in it is refused, which need not be the one that came last.
        A reservation id is used once; raises ValueError for one that is booked or queued already.
        """
        if demand.reservation in self._ledger or demand.reservation in self._queue:
            raise ValueError(f"reservation {demand.reservation} is in use: submit each request under a new id")
        refusal = (
            self._refuse_if_too_often(demand, now) or self._refuse_if_never(demand) or self._refuse_if_too_many(demand)
        )
        if refusal is not None:
            return refusal
        waiting = self._enter(demand, now)
        placed = self._serve(now, only=waiting)
        if placed:
            return placed[0]
        if len(self._queue) > self._settings.queue_length:
            last = self._queue.last()
            self._leave(last)
            refusal = self._refuse_for_full_queue(last, now)
            if last is waiting:
                return refusal
            self._displaced.append(refusal)
        return None

    def observe(self, report: CapacityReport, now: float) -> list[Decision]:
        """Take a replica's report. A new engine may bring limits under which a waiting request never fits."""
        known = self._ledger.replicas.get(report.replica)
        is_new = known is None or known.report.epoch != report.epoch
        is_taken = self._ledger.observe(report, now)
        for reservation in report.finished:
            self._settle(reservation, report.block_seconds.get(reservation, 0.0))
        decisions: list[Decision] = []
        if is_taken:
            self._usage.observe(report)
        if is_taken and report.replica not in self._placements:
            # Zeros from the start: a series that begins with its first placement hides that rate.
            reasons = (self._settings.short_placement, self._settings.long_placement)
            self._placements[report.replica] = Counter(dict.fromkeys(reasons, 0))
        if is_new and is_taken:
            for waiting in self._queue:
                refusal = self._refuse_if_never(waiting.demand)
                if refusal is not None:
                    self._leave(waiting)
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
            self._leave(waiting)
            return self._serve(now)
        return []

    def failed(self, reservation: str, demand: Demand, now: float) -> Demand:
        """A replica failed a request before it answered: its reservation ends, and `demand`, the same anew, avoids it.

        The replica gets nothing until it reports again: it may be dead or only have lost a connection.
        """
        self._retries += 1
        demand = replace(demand, former=reservation)
        replica = self._ledger.replica_of(reservation)
        if replica is None:
            return demand
        self._ledger.release(reservation, now)
        self._ledger.suspect(replica)
        return replace(demand, avoid=replica)

    def set_listed(self, replicas: frozenset[str], now: float) -> list[Decision]:
        """The replicas that requests get to: the others start or drain, and get nothing new."""
        self._ledger.set_listed(replicas)
        return self._serve(now)

    def stale(self, now: float) -> list[str]:
        """Replicas that are listed and silent: whoever can should ask them for a report."""
        limit = self._settings.stale_report_seconds
        return [name for name in self.silent(now, limit) if self._ledger.replicas[name].is_listed]

    def load(self, now: float) -> FleetLoad:
        """What autoscaling looks at."""
        table, fresh = self._ledger.table, self._ledger.fresh(now)
        capacity = int(table.usable[fresh].sum())
        return FleetLoad(int(fresh.sum()), capacity, capacity - int(table.headroom[fresh].sum()), self._queue.blocks)

    def remove_replica(self, replica: str, now: float) -> list[Decision]:
        """The replica is gone: its bookings end, its series disappear, late reports of it are ignored."""
        self._ledger.remove(replica, now)
        self._placements.pop(replica, None)
        return self._serve(now)

    def report_age(self, replica: str, now: float) -> float:
        """Seconds since its last report; the replica is known."""
        return self._ledger.replicas[replica].age_seconds(now)

    def gone(self, now: float, seconds: float) -> list[str]:
        """Replicas that were silent for so long that they are dead, or stopped after they had drained."""
        stale = self.silent(now, self._settings.stale_report_seconds)
        known = self._ledger.replicas
        return [r for r in stale if known[r].is_draining or known[r].age_seconds(now) > seconds]

    def silent(self, now: float, seconds: float) -> list[str]:
        """Replicas that nothing was heard of for longer than that."""
        table = self._ledger.table
        shut = [table.names[row] for row in np.flatnonzero(now - table.heard_at > seconds)]
        return [name for name in shut if self._ledger.replicas[name].age_seconds(now) > seconds]

    def tick(self, now: float) -> list[Decision]:
        """What time alone changes: leases, deadlines. Call it a few times a second."""
        if now - self._leases_checked_at >= LEASE_CHECK_SECONDS:
            self._leases_checked_at = now
            self._ledger.expire(now)
            for reservation in [r for r in self._unsettled() if r not in self._ledger and r not in self._queue]:
                # Nobody told what it took: its replica died, or it never got there.
                self._settle(reservation, 0.0)
        self._advance(now)
        self._queue.age()
        decisions: list[Decision] = [*self._displaced, *self._serve(now)]
        self._displaced.clear()
        deadline = self._settings.queue_deadline_seconds
        for waiting in self._queue.since_before(now - deadline):
            self._leave(waiting)
            decisions.append(self._refuse_late(waiting, now))
        return decisions

    def snapshot(self, now: float) -> FleetSnapshot:
        lengths = Counter((waiting.demand.tier, waiting.kind) for waiting in self._queue)
        usage = self._usage.totals()
        tiers = {
            name: TierSnapshot(
                first_token_target_seconds=tier.first_token_target_seconds,
                queue_length={kind: lengths[name, kind] for kind in (SHORT, LONG)},
                counts=self._counts[name].copy(),
                usage=usage.get(name, TierUsage()),
            )
            for name, tier in self._tiers.items()
        }
        self._releases.observe(self._ledger.ended_blocks, now)
        return FleetSnapshot(
            replicas=self._ledger.snapshot(now),
            tiers=tiers,
            queue_length={kind: sum(tier.queue_length[kind] for tier in tiers.values()) for kind in (SHORT, LONG)},
            queued_blocks=self._queue.blocks,
            admissions=sum(tier.counts.admissions for tier in tiers.values()),
            placements={replica: dict(counts) for replica, counts in self._placements.items()},
            rejections={
                reason: sum(tier.counts.rejections[reason] for tier in tiers.values()) for reason in REJECTION_REASONS
            },
            lease_expirations=self._ledger.lease_expirations,
            reports_ignored=self._ledger.reports_ignored,
            released_blocks_per_second=self._releases.per_second(now),
            retries=self._retries,
        )

    # -- the queue ---------------------------------------------------------------------------------------

    def _serve(self, now: float, rows: slice = EVERY_ROW, only: Waiting | None = None) -> list[Decision]:
        """Place whoever can be placed, in order; with `only` at most that one.

        `rows` are the replicas that may have gained headroom since the last call; on the others nobody who waits
        can be placed. A request that does not fit waits for every replica on which it could ever fit (`Claims`).
        Short ones come first, with one exception: when a long request has waited for half of its deadline, the
        replica that is closest to fitting it takes no short ones, unless it is the only one.
        """
        self._releases.observe(self._ledger.ended_blocks, now)
        table = self._ledger.table
        decisions: list[Decision] = []
        claims = {kind: Claims(table, rows) for kind, length in self._queue.lengths.items() if length}
        closed_to_short = self._set_aside(now)
        for kind, claimed in claims.items():
            for waiting in self._queue.of(kind):
                needs = waiting.needs(table)
                if (only is None or waiting is only) and claimed.leave_any_to(needs):
                    closed = closed_to_short if kind == SHORT else None
                    placement = self._place(waiting, rows, claimed, closed, now)
                    if placement is not None:
                        decisions.append(placement)
                        continue
                claimed.add(needs)
                if waiting is only or claimed.cover_all:
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
        needs = waiting.needs(table)
        uses = self._ledger.expected_use(waiting.demand, needs)
        fits = table.fits(rows, uses, self._ledger.margin)
        if not fits.any():
            return None
        fits &= self._ledger.fresh(now, rows) & claimed.open()
        first_row = rows.start or 0
        began = waiting.since + waiting.demand.waited_seconds
        avoided = waiting.demand.avoid if now - began < AVOID_SECONDS else None
        for barred in (closed, table.row_of.get(avoided or "")):
            if barred is not None and 0 <= barred - first_row < len(fits):
                fits[barred - first_row] = False
        found = np.flatnonzero(fits)
        if not len(found):
            return None
        kinds = table.kind[rows][found]
        candidates = Candidates(
            table.headroom[rows][found],
            uses.mean.max(axis=1)[kinds],
            table.requests[rows][found],
            *self._ties(waiting.demand, found + first_row),
        )
        name = self._settings.short_placement if waiting.kind == SHORT else self._settings.long_placement
        policy: Policy = POLICIES[name]
        chosen = policy(candidates, self._rng)
        replica, kind = table.names[first_row + found[chosen]], kinds[chosen]
        self._ledger.book(waiting.demand, replica, needs[kind], uses.row(kind), now)
        self._queue.remove(waiting)
        self._shares[waiting.kind].placed(waiting.demand.reservation)
        counts = self._counts[waiting.demand.tier]
        counts.admissions += 1
        counts.waits[waiting.kind].observe(max(0.0, now - began))
        self._placements[replica][name] += 1
        self._prefixes.note(waiting.demand.prefix, replica)
        return Placement(waiting.demand.reservation, replica, name, waiting.kind)

    def _ties(self, demand: Demand, rows: NDArray[np.intp]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """What decides between equal replicas: how much of the prompt each has cached, and whether it is near."""
        table = self._ledger.table
        affinity = np.zeros(len(table), np.int64)
        for replica, depth in self._prefixes.shared(demand.prefix).items():
            row = table.row_of.get(replica)
            if row is not None:
                affinity[row] = depth
        is_local = table.node[rows] == table.nodes.get(demand.node, -1)
        return affinity[rows], is_local

    def _set_aside(self, now: float) -> int | None:
        """The row kept free of short requests for the sake of a long one that has waited for half of its deadline: of
        those that could ever take it the one of most headroom; None where no other would take requests.

        It stays the same until that request is gone: the one of most headroom is always the one where something has
        just ended, so choosing anew each time would close whatever becomes free.
        """
        table = self._ledger.table
        first = self._queue.first(LONG)
        if first is None or now - first.since < self._settings.queue_deadline_seconds / 2:
            return None
        fresh = self._ledger.fresh(now)
        if fresh.sum() < 2:
            return None
        reservation, replica = self._kept_free
        row = table.row_of.get(replica)
        if reservation == first.demand.reservation and row is not None and fresh[row]:
            return row
        able = np.flatnonzero(fresh & (table.usable >= np.array(first.needs(table))[table.kind]))
        if not len(able):
            return None
        row = int(able[table.headroom[able].argmax()])
        self._kept_free = (first.demand.reservation, table.names[row])
        return row

    def _enter(self, demand: Demand, now: float) -> Waiting:
        """Into the queue: the request's class, its place, and what its tenant is charged for it."""
        is_short = demand.total_tokens * demand.sequences <= self._settings.short_request_tokens
        kind = SHORT if is_short else LONG
        blocks = min((blocks_needed(demand, kind) for kind, _ in self._ledger.table.largest), default=0)
        tier, step = self._tiers[demand.tier], self._settings.aging_seconds
        self._advance(now)
        start = None
        if demand.former is not None:
            start = self._shares[kind].charge_again(demand.reservation, demand.former, self._capacity())
        if start is None:
            flow = (demand.tenant, demand.priority)
            start = self._shares[kind].charge(demand.reservation, flow, tier.share, blocks, self._capacity())
        target = tier.first_token_target_seconds or step
        waiting = Waiting(
            demand=demand,
            since=now - demand.waited_seconds,
            kind=kind,
            start=start,
            lead=step - target - demand.priority * step,
            blocks=blocks,
        )
        self._queue.add(waiting)
        return waiting

    def _advance(self, now: float) -> None:
        for kind, shares in self._shares.items():
            first = self._queue.first(kind)
            shares.advance(now, None if first is None else first.start)

    def _leave(self, waiting: Waiting) -> None:
        """Out of the queue without a place."""
        self._queue.remove(waiting)
        self._settle(waiting.demand.reservation, 0.0)

    def _settle(self, reservation: str, block_seconds: float) -> None:
        for shares in self._shares.values():
            shares.settle(reservation, block_seconds, self._capacity())

    def _unsettled(self) -> list[str]:
        return [reservation for shares in self._shares.values() for reservation in shares.charges]

    def _capacity(self) -> int:
        return int(self._ledger.table.usable.sum())

    # -- refusals ----------------------------------------------------------------------------------------

    def _refuse_if_never(self, demand: Demand) -> Refusal | None:
        refusal = refuse_if_never(demand, self._ledger.table.largest)
        if refusal is not None:
            self._counts[demand.tier].rejections[refusal.reason] += 1
        return refusal

    def has_too_many(self, demand: Demand) -> bool:
        """Whether the tenant has as many requests as it may have at once in the whole fleet, running and waiting."""
        limit = self._tiers[demand.tier].concurrent_requests
        if limit is None:
            return False
        mine = [r for shares in self._shares.values() for r in shares.of_tenant.get(demand.tenant, ())]
        return sum(reservation in self._ledger or reservation in self._queue for reservation in mine) >= limit

    def _refuse_if_too_many(self, demand: Demand) -> Refusal | None:
        limit = self._tiers[demand.tier].concurrent_requests
        if limit is None or not self.has_too_many(demand):
            return None
        reason = "concurrent_requests"
        self._counts[demand.tier].rejections[reason] += 1
        return Refusal(demand.reservation, 429, reason, too_many_at_once(limit), retry_after_seconds=1)

    def _refuse_if_too_often(self, demand: Demand, now: float) -> Refusal | None:
        allowance = self._tiers[demand.tier].allowance
        if demand.former is not None or (answer := self._turnstile.begin(demand.tenant, allowance, now)) is None:
            return None
        reason = "requests_per_minute"
        self._counts[demand.tier].rejections[reason] += 1
        return Refusal(demand.reservation, answer.status, reason, answer.message, answer.retry_after_seconds)

    def _refuse_for_full_queue(self, waiting: Waiting, now: float) -> Refusal:
        message = (
            f"All replicas are full and {len(self._queue)} requests wait already that are due earlier (queue_length): "
            "send the request again later."
        )
        return self._refuse(waiting, status=429, reason="queue_full", message=message, now=now)

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
        self._counts[waiting.demand.tier].rejections[reason] += 1
        return Refusal(
            waiting.demand.reservation,
            status=status,
            reason=reason,
            message=message,
            retry_after_seconds=self._releases.retry_after(
                self._queue.blocks + waiting.blocks, now, self._settings.queue_deadline_seconds
            ),
        )
