"""What the coordinator knows of every replica's blocks: reported, reserved and predicted, never mixed.

Owns bookings (reservations that were placed), epochs, sequence numbers and leases. Who is admitted where is
decided in `admission.py`, what requests are expected to hold later in `growth.py`. Plain state and arithmetic: clocks
are passed in as seconds.

    total = 20 |#### held ####|                    free as reported                      |
                              |~ growth ~|-- reserved --|  headroom  |w watermark w|
     growth: what the running requests of the last report are expected to take on top, at most up to their bounds
     reserved: what bookings that no report shows yet are expected to take
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from deploy.growth import UNKNOWN, Lengths, Requests, Use, expected_use, length_class
from deploy.messages import CapacityReport, Demand, GpuReading
from deploy.replica_table import ROUNDING, ReplicaKind, ReplicaTable
from triattention.bounds import blocks_bound
from triattention.report import EngineReport

EVERY_ROW = slice(None)


@dataclass
class Booking:
    """One placed request on one replica."""

    bound_blocks: int
    """Most blocks it ever holds there."""
    heard_at: float
    """When it was placed, or when a report last showed it: its lease runs from here."""
    length_class: int
    prompt_tokens: int
    sequences: int = 1
    written_tokens: int = 0
    """As last reported."""
    held_blocks: int | None = None
    """As the last report has it; None while no report shows it (not arrived, waiting or preempted)."""

    def row(self) -> tuple[int, int, int, int, int, int]:
        """For `growth.Requests`."""
        held = -1 if self.held_blocks is None else self.held_blocks
        return (self.length_class, self.prompt_tokens, self.written_tokens, self.sequences, held, self.bound_blocks)


@dataclass(frozen=True)
class ReplicaSnapshot:
    """One replica at one moment. Blocks are that replica's own; `engine` is the last report, untouched."""

    replica: str
    epoch: str
    max_model_len: int
    budget: int | None
    """None: compression is off."""
    engine: EngineReport
    report_age_seconds: float
    fresh: bool
    """False: silent for too long, so nothing new is placed there. It may be idle or full: unknown."""
    reachable: bool
    """A router has said that requests get there: False while it starts or drains."""
    draining: bool
    """Told to stop: it finishes what it has and takes nothing new."""
    held_blocks: int
    """total - free, as reported."""
    reserved_blocks: int
    """What is expected of the bookings that the report does not show."""
    predicted_blocks: int
    """Growth expected of all others."""
    headroom_blocks: int
    """free - reserved - predicted - watermark; negative when more is promised than there is."""
    reservations: int
    drift_blocks: int
    """Held blocks that no booking explains; negative where requests share prefix blocks."""
    gpu: GpuReading | None
    """As last reported; None where there is no NVML."""


class ReplicaLedger:
    """The bookings of one replica against its last report."""

    def __init__(self, report: CapacityReport, now: float, watermark_blocks: int, margin: float) -> None:
        self.report = report
        self.reported_at = now
        self.is_suspect = False
        """Something spoke against it since its last report."""
        self.is_listed = True
        """Requests get there, by Serve's list and HAProxy's: False while it starts or drains."""
        self.was_listed = False
        self.watermark_blocks = watermark_blocks
        self.margin = margin
        """Standard deviations beyond the mean that are kept free for what is expected."""
        self.bookings: dict[str, Booking] = {}
        self.expected = Use.always(0)
        """What all that is here may hold at each of `growth.HORIZONS`, what no booking explains included."""
        self._reserved = 0.0
        self.unseen = 0
        """Bookings that the last report does not show."""
        self._ended: dict[str, float] = {}
        """Reservation -> when we were told of its end, oldest first: a report of just before still shows it."""

    @property
    def is_draining(self) -> bool:
        """It was told to stop: it finishes what it has and takes nothing new."""
        return self.was_listed and not self.is_listed

    @property
    def headroom_blocks(self) -> int:
        kept = self.expected.to_keep(self.margin).max()
        return math.floor(self.report.engine.total_blocks - self.watermark_blocks - kept + ROUNDING)

    @property
    def reserved_blocks(self) -> int:
        """What is expected of bookings that the report does not show."""
        return math.ceil(self._reserved - ROUNDING)

    @property
    def predicted_blocks(self) -> int:
        """Growth that is expected of what the report shows."""
        promised = self.report.engine.free_blocks - self.watermark_blocks - self.headroom_blocks
        return promised - self.reserved_blocks

    @property
    def requests(self) -> int:
        """Running and waiting as reported, and what was sent there since."""
        return self.report.engine.running + max(self.report.engine.waiting, self.unseen)

    @property
    def drift_blocks(self) -> int:
        engine = self.report.engine
        explained = sum(min(b.held_blocks or 0, b.bound_blocks) for b in self.bookings.values())
        return engine.total_blocks - engine.free_blocks - explained

    def age_seconds(self, now: float) -> float:
        return now - self.reported_at

    def book(self, reservation: str, booking: Booking, use: Use) -> None:
        """Add a booking, and what it is expected to hold [horizons] to the sums."""
        assert reservation not in self.bookings, f"{reservation} is booked twice on {self.report.replica}"
        self.bookings[reservation] = booking
        self.expected = self.expected + use
        self._reserved += use.mean.max()
        self.unseen += 1

    def drop(self, reservation: str) -> Booking:
        """Take a booking away. `add_up` is due after this."""
        return self.bookings.pop(reservation)

    def remember_end(self, reservation: str, now: float) -> None:
        """Someone who knows said that this request has ended."""
        self._ended.pop(reservation, None)
        self._ended[reservation] = now

    def observe(self, report: CapacityReport, now: float) -> list[str]:
        """Take a newer report; the reservations that it shows for the first time without a booking.

        Those are requests of before a restart of the coordinator, or such as outlived their lease. The report
        tells what they hold but not their bound, so they are booked with the most that one can hold which
        holds that much: its own blocks as prompt, and on top what behind a prompt may live.
        """
        self.report = report
        self.reported_at = now
        self.is_suspect = False
        strangers = []
        for reservation, held in report.held_blocks.items():
            if reservation in self._ended:
                continue
            if reservation not in self.bookings:
                # Any prompt that fills the bound stands for one that is not known.
                bound = self._largest_bound(held)
                self.bookings[reservation] = Booking(bound, now, UNKNOWN, bound * report.engine.block_size)
                strangers.append(reservation)
        for reservation, booking in self.bookings.items():
            # Not shown any more and not finished: preempted. It will come back for what it had.
            booking.held_blocks = report.held_blocks.get(reservation)
            if booking.held_blocks is not None:
                booking.heard_at = now
                booking.written_tokens = report.output_tokens.get(reservation, booking.written_tokens)
        return strangers

    def add_up(self, lengths: Lengths) -> None:
        """Sum up what the bookings are expected to hold."""
        engine = self.report.engine
        requests = Requests.of([booking.row() for booking in self.bookings.values()])
        use = expected_use(requests, engine.block_size, lengths)
        is_unseen = requests.held_blocks < 0
        unexplained = engine.total_blocks - engine.free_blocks - requests.held_blocks[~is_unseen].sum()
        self.expected = use.sum() + Use.always(unexplained)
        self.unseen = int(is_unseen.sum())
        self._reserved = float(use.mean[is_unseen].max(axis=1).sum())

    def expired(self, now: float, lease_seconds: float) -> list[str]:
        """Bookings that no report has shown for longer than the lease. Forgets endings of that age, too."""
        while self._ended and now - next(iter(self._ended.values())) > lease_seconds:
            del self._ended[next(iter(self._ended))]
        return [r for r, booking in self.bookings.items() if now - booking.heard_at > lease_seconds]

    def snapshot(self, now: float, stale_seconds: float) -> ReplicaSnapshot:
        engine, limits = self.report.engine, self.report.limits
        return ReplicaSnapshot(
            replica=self.report.replica,
            epoch=self.report.epoch,
            max_model_len=limits.max_model_len,
            budget=None if limits.compression is None else limits.compression.budget,
            engine=engine,
            report_age_seconds=self.age_seconds(now),
            fresh=not self.is_suspect and self.age_seconds(now) <= stale_seconds,
            reachable=self.was_listed and self.is_listed,
            draining=self.is_draining,
            held_blocks=engine.total_blocks - engine.free_blocks,
            reserved_blocks=self.reserved_blocks,
            predicted_blocks=self.predicted_blocks,
            headroom_blocks=self.headroom_blocks,
            reservations=len(self.bookings),
            drift_blocks=self.drift_blocks,
            gpu=self.report.gpu,
        )

    def _largest_bound(self, held_blocks: int) -> int:
        engine, limits = self.report.engine, self.report.limits
        held_tokens = held_blocks * engine.block_size
        longest = max(held_tokens, limits.max_model_len)
        return blocks_bound(held_tokens, longest, engine.block_size, limits.compression, engine.in_flight_tokens)


class Ledger:
    """All replicas that have reported, and where each reservation is booked."""

    def __init__(
        self, lease_seconds: float, stale_report_seconds: float, watermark_blocks: int, growth_quantile: float = 1.0
    ) -> None:
        self.lease_seconds = lease_seconds
        self.stale_report_seconds = stale_report_seconds
        self.watermark_blocks = watermark_blocks
        self.books_whole_bounds = growth_quantile == 1
        self.margin = 0.0 if self.books_whole_bounds else NormalDist().inv_cdf(growth_quantile)
        self.lengths = Lengths()
        self.replicas: dict[str, ReplicaLedger] = {}
        self.table = ReplicaTable()
        """The same replicas as columns, kept up to date with every change: what placement looks at."""
        self.lease_expirations = 0
        self.reports_ignored = 0
        self.ended_blocks = 0
        """Bounds of all bookings that ended: what the release rate is measured on."""
        self._listed: frozenset[str] | None = None
        self._replica_of: dict[str, str] = {}
        self._past: dict[tuple[str, str], float] = {}
        """(replica, epoch) -> when a later epoch or the replica's removal ended it. Its late reports are ignored
        for one lease, and not for ever: who wrongly counts as past gets back in."""

    def __contains__(self, reservation: str) -> bool:
        return reservation in self._replica_of

    def observe(self, report: CapacityReport, now: float) -> bool:
        """Take a report; False for one to ignore: a duplicate, overtaken by a later one, or of a past epoch.

        What an ignored report says of ends still counts: an end is never taken back.
        """
        known = self.replicas.get(report.replica)
        origin = (report.replica, report.epoch)
        is_past = origin in self._past
        is_new = known is None and not is_past
        if is_new:
            known = self.replicas[report.replica] = ReplicaLedger(report, now, self.watermark_blocks, self.margin)
            self._note_listed(known)
            self.table.add(report.replica)
            is_newer = True
        else:
            is_newer = known is not None and not is_past and self._is_newer(report, known.report)
        for reservation in report.finished:
            booked = self._replica_of.get(reservation)
            if booked is not None:
                ended = self._drop(reservation)
                if booked == report.replica and reservation in report.output_tokens:
                    self.lengths.note(ended.length_class, report.output_tokens[reservation] // ended.sequences)
                else:
                    self._show(self.replicas[booked])
            if known is not None:
                known.remember_end(reservation, now)
        if known is None or not is_newer:
            self.reports_ignored += 1
            if known is not None:
                self._show(known)
            return False
        if is_new or report.epoch != known.report.epoch:
            usable = report.engine.total_blocks - self.watermark_blocks
            self.table.set_kind(report.replica, ReplicaKind.of(report), usable, report.node)
        if report.epoch != known.report.epoch:
            # A new engine holds nothing of the old one's; what it already shows did reach the new one.
            self._past[report.replica, known.report.epoch] = now
            for reservation in [r for r in known.bookings if r not in report.held_blocks]:
                self._drop(reservation)
        for stranger in known.observe(report, now):
            if (elsewhere := self._replica_of.get(stranger)) is not None:
                # Booked there, but HAProxy sent it here by its own choice: the old booking would never end.
                self._drop(stranger)
                self._show(self.replicas[elsewhere])
            self._replica_of[stranger] = report.replica
        self._show(known)
        return True

    def book(self, demand: Demand, replica: str, bound_blocks: int, use: Use, now: float) -> None:
        """`use` [horizons] is what `expected_use` has for the replica's kind."""
        known = self.replicas[replica]
        reservation = demand.reservation
        known_class = self.class_on(ReplicaKind.of(known.report), demand)
        booking = Booking(bound_blocks, now, known_class, demand.prompt_tokens, demand.sequences)
        known.book(reservation, booking, use)
        self._replica_of[reservation] = replica
        self._show_sums(known)

    def class_on(self, kind: ReplicaKind, demand: Demand) -> int:
        """Whose lengths tell when the request ends; where its whole bound counts, nobody's."""
        if self.books_whole_bounds or kind.reserves_growth:
            return UNKNOWN
        return length_class(demand.total_tokens - demand.prompt_tokens)

    def expected_use(self, demand: Demand, bounds: Sequence[int]) -> Use:
        """What a new request is expected to hold on each kind of replica [kinds, horizons], by its bound there."""
        kinds = self.table.kinds
        rows = [
            (self.class_on(kind, demand), demand.prompt_tokens, 0, demand.sequences, -1, bound)
            for kind, bound in zip(kinds, bounds, strict=True)
        ]
        block_sizes = np.array([[kind.block_size] for kind in kinds])
        return expected_use(Requests.of(rows), block_sizes, self.lengths)

    def replica_of(self, reservation: str) -> str | None:
        """Where it is booked; None where it is not."""
        return self._replica_of.get(reservation)

    def release(self, reservation: str, now: float) -> bool:
        """End a booking that someone says is over; False, and no harm, where there is none."""
        replica = self._replica_of.get(reservation)
        if replica is None:
            return False
        self._drop(reservation)
        known = self.replicas[replica]
        known.remember_end(reservation, now)
        self._show(known)
        return True

    def set_listed(self, replicas: frozenset[str]) -> None:
        """The replicas that requests get to. Until this is first told, all are taken for listed."""
        if replicas != self._listed:
            self._listed = replicas
            for known in self.replicas.values():
                self._note_listed(known)
                self._show_state(known)

    def _note_listed(self, known: ReplicaLedger) -> None:
        if self._listed is not None:
            known.is_listed = known.report.replica in self._listed
            known.was_listed = known.was_listed or known.is_listed

    def suspect(self, replica: str) -> None:
        """Something speaks against this replica: nothing new goes there until its next report."""
        known = self.replicas[replica]
        known.is_suspect = True
        self._show_state(known)

    def remove(self, replica: str, now: float) -> None:
        """Forget a replica that is gone. Reports that are still on their way are ignored for one lease."""
        known = self.replicas.get(replica)
        if known is None:
            return
        for reservation in list(known.bookings):
            self._drop(reservation)
        self._past[replica, known.report.epoch] = now
        self.table.remove(replica)
        del self.replicas[replica]

    def expire(self, now: float) -> None:
        """Drop the bookings whose lease has run out. Should one show up after all, it is a stranger then."""
        self._past = {origin: at for origin, at in self._past.items() if now - at <= self.lease_seconds}
        for known in self.replicas.values():
            expired = known.expired(now, self.lease_seconds)
            for reservation in expired:
                self._drop(reservation)
            if expired:
                self.lease_expirations += len(expired)
                self._show(known)

    def fresh(self, now: float, rows: slice = EVERY_ROW) -> NDArray[np.bool_]:
        """Which replicas were heard of lately. The others may be idle or full, so nothing new goes there."""
        return now - self.table.heard_at[rows] <= self.stale_report_seconds

    def snapshot(self, now: float) -> tuple[ReplicaSnapshot, ...]:
        names = sorted(self.replicas)
        return tuple(self.replicas[name].snapshot(now, self.stale_report_seconds) for name in names)

    def _drop(self, reservation: str) -> Booking:
        """`_show` is due after this."""
        ended = self.replicas[self._replica_of.pop(reservation)].drop(reservation)
        self.ended_blocks += ended.bound_blocks
        return ended

    def _show(self, known: ReplicaLedger) -> None:
        """Its bookings or its report have changed."""
        known.add_up(self.lengths)
        self._show_sums(known)
        self._show_state(known)

    def _show_sums(self, known: ReplicaLedger) -> None:
        self.table.update(known.report.replica, known.headroom_blocks, known.requests, known.expected)

    def _show_state(self, known: ReplicaLedger) -> None:
        """Whether it takes anything may have changed."""
        is_shut = known.is_suspect or not known.is_listed
        self.table.set_heard_at(known.report.replica, -math.inf if is_shut else known.reported_at)

    @staticmethod
    def _is_newer(report: CapacityReport, last: CapacityReport) -> bool:
        return report.epoch != last.epoch or report.sequence > last.sequence
