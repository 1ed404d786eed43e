"""A state machine against the ledger: reports late, twice and lost, releases at any time, and engines and the
coordinator restart.

The machine plays the engines, so it knows the truth: a replica's true headroom is its pool less the bounds of
all requests that run there or are on their way. The ledger may be below it. It may be above it only by
requests of which it was told that they ended while the engine still had them.
"""

from dataclasses import dataclass, field, replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from numpy.testing import assert_allclose

from deploy.ledger import Ledger
from deploy.messages import CapacityReport
from tests.unit.reports import book, demand, report

TOTAL = 60
LEASE = 10.0
NAMES = ("a", "b")


@dataclass
class Request:
    bound: int
    replica: str
    arrived: bool = False
    held: int = 0


@dataclass
class Engine:
    """One replica as it really is."""

    epoch: int = 0
    sequence: int = 0
    finished: list[str] = field(default_factory=list)


class LedgerMachine(RuleBasedStateMachine):
    @initialize()
    def start(self) -> None:
        self.now = 0.0
        self.ledger = self.new_ledger()
        self.engines = {name: Engine() for name in NAMES}
        self.living: dict[str, Request] = {}
        """On their way or in an engine."""
        self.given_up: set[str] = set()
        """The ledger was right to let go of them although they live: released, expired, or their engine restarted."""
        self.network: list[CapacityReport] = []
        self.names = 0
        for name in NAMES:
            self.ledger.observe(self.make_report(name), self.now)

    def new_ledger(self) -> Ledger:
        return Ledger(lease_seconds=LEASE, stale_report_seconds=2, watermark_blocks=0)

    def bookings(self, name: str) -> set[str]:
        known = self.ledger.replicas.get(name)
        return set() if known is None else set(known.bookings)

    def make_report(self, name: str) -> CapacityReport:
        engine = self.engines[name]
        engine.sequence += 1
        finished, engine.finished = tuple(engine.finished), []
        held = {r: q.held for r, q in self.living.items() if q.replica == name and q.arrived and q.held}
        made = report(name, engine.sequence, epoch=str(engine.epoch), total=TOTAL, held=held, finished=finished)
        return replace(made, engine=replace(made.engine, free_blocks=TOTAL - sum(held.values())))

    def deliver(self, made: CapacityReport) -> None:
        before = self.bookings(made.replica)
        known = self.ledger.replicas.get(made.replica)
        is_new_epoch = known is not None and made.epoch != known.report.epoch
        taken = self.ledger.observe(made, self.now)
        after = self.bookings(made.replica)
        if taken and is_new_epoch:
            self.given_up |= before - after
        else:
            assert before - after <= set(made.finished), (
                "a report without a new epoch drops only what it calls finished"
            )
        # A request that outlived its booking is booked again, and with no less than it may come to hold.
        self.given_up -= after - before

    # -- what happens to requests --------------------------------------------------------------------

    @rule(name=st.sampled_from(NAMES), bound=st.integers(1, 25))
    def place(self, name: str, bound: int) -> None:
        if name not in self.ledger.replicas or self.ledger.replicas[name].headroom_blocks < bound:
            return
        self.names += 1
        reservation = f"r{self.names}"
        book(self.ledger, demand(reservation), name, bound, self.now)
        self.living[reservation] = Request(bound, name)

    @precondition(lambda self: self.living)
    @rule(data=st.data())
    def arrive(self, data: st.DataObject) -> None:
        self.living[data.draw(st.sampled_from(sorted(self.living)))].arrived = True

    @precondition(lambda self: any(not q.arrived for q in self.living.values()))
    @rule(data=st.data())
    def arrive_elsewhere(self, data: st.DataObject) -> None:
        """HAProxy sends a request by its own choice while no router answers it."""
        reservation = data.draw(st.sampled_from(sorted(r for r, q in self.living.items() if not q.arrived)))
        request = self.living[reservation]
        request.replica = "b" if request.replica == "a" else "a"
        others = sum(q.held for q in self.living.values() if q.replica == request.replica and q is not request)
        request.arrived, request.held = True, min(1, TOTAL - others)
        self.given_up.add(reservation)
        self.deliver(self.make_report(request.replica))

    @precondition(lambda self: any(q.arrived for q in self.living.values()))
    @rule(data=st.data(), blocks=st.integers(0, 25))
    def grow_shrink_or_be_preempted(self, data: st.DataObject, blocks: int) -> None:
        arrived = sorted(r for r, q in self.living.items() if q.arrived)
        request = self.living[data.draw(st.sampled_from(arrived))]
        others = sum(q.held for q in self.living.values() if q.replica == request.replica and q is not request)
        request.held = min(blocks, request.bound, TOTAL - others)

    @precondition(lambda self: self.living)
    @rule(data=st.data(), told=st.booleans())
    def end(self, data: st.DataObject, told: bool) -> None:
        reservation = data.draw(st.sampled_from(sorted(self.living)))
        request = self.living.pop(reservation)
        if told:
            self.engines[request.replica].finished.append(reservation)

    @precondition(lambda self: self.names)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        """Any request that ever was: living, ended, released before."""
        reservation = f"r{data.draw(st.integers(1, self.names))}"
        self.ledger.release(reservation, self.now)
        assert reservation not in self.ledger
        assert not self.ledger.release(reservation, self.now)
        self.given_up.add(reservation)

    @rule(name=st.sampled_from(NAMES))
    def restart_engine(self, name: str) -> None:
        self.engines[name] = Engine(epoch=self.engines[name].epoch + 1)
        self.living = {r: q for r, q in self.living.items() if q.replica != name or not q.arrived}

    @rule()
    def restart_coordinator(self) -> None:
        """It knows nothing until the replicas report: what no report shows is lost to it."""
        self.ledger = self.new_ledger()
        self.given_up |= set(self.living)

    @rule(name=st.sampled_from(NAMES))
    def take_a_silent_replica_out(self, name: str) -> None:
        self.given_up |= self.bookings(name)
        self.ledger.remove(name, self.now)
        assert name not in self.ledger.replicas

    @rule(seconds=st.floats(0.1, 8))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        before = {r for known in self.ledger.replicas.values() for r in known.bookings}
        self.ledger.expire(self.now)
        self.given_up |= {r for r in before if r not in self.ledger}

    # -- what happens to reports ---------------------------------------------------------------------

    @rule(name=st.sampled_from(NAMES))
    def send_report(self, name: str) -> None:
        self.network.append(self.make_report(name))

    @precondition(lambda self: self.network)
    @rule(data=st.data(), stays=st.booleans())
    def deliver_any_report(self, data: st.DataObject, stays: bool) -> None:
        position = data.draw(st.integers(0, len(self.network) - 1))
        self.deliver(self.network[position] if stays else self.network.pop(position))

    @precondition(lambda self: self.network)
    @rule(data=st.data())
    def lose_report(self, data: st.DataObject) -> None:
        self.network.pop(data.draw(st.integers(0, len(self.network) - 1)))

    # -- what always holds ---------------------------------------------------------------------------

    @invariant()
    def sums_are_those_of_the_bookings_and_not_negative(self) -> None:
        for known in self.ledger.replicas.values():
            bookings = known.bookings.values()
            unseen = [b.bound_blocks for b in bookings if b.held_blocks is None]
            growth = [max(0, b.bound_blocks - b.held_blocks) for b in bookings if b.held_blocks is not None]
            assert known.reserved_blocks == sum(unseen) >= 0
            assert known.predicted_blocks == sum(growth) >= 0

    @invariant()
    def sums_are_the_same_as_if_added_up_anew(self) -> None:
        for known in self.ledger.replicas.values():
            kept, reserved = known.expected, known.reserved_blocks
            known.add_up(self.ledger.lengths)
            for name in ("mean", "variance", "most"):
                assert_allclose(getattr(kept, name), getattr(known.expected, name), atol=1e-6)
            assert reserved == known.reserved_blocks

    @invariant()
    def every_booking_is_found_under_its_replica_and_no_other(self) -> None:
        for name, known in self.ledger.replicas.items():
            for reservation in known.bookings:
                assert self.ledger._replica_of[reservation] == name
        assert len(self.ledger._replica_of) == sum(len(k.bookings) for k in self.ledger.replicas.values())

    @invariant()
    def the_columns_that_placement_compares_show_the_same(self) -> None:
        table = self.ledger.table
        assert table.names == list(self.ledger.replicas)
        for row, known in enumerate(self.ledger.replicas.values()):
            assert (table.headroom[row], table.requests[row]) == (known.headroom_blocks, known.requests)
            assert known.unseen == sum(b.held_blocks is None for b in known.bookings.values())

    @invariant()
    def headroom_is_never_above_the_truth_by_more_than_what_was_given_up(self) -> None:
        for name, known in self.ledger.replicas.items():
            if known.report.epoch != str(self.engines[name].epoch):
                continue  # a restart that nobody has heard of: the old engine's truth is gone
            kept = sum(q.bound for r, q in self.living.items() if q.replica == name and r not in self.given_up)
            assert known.headroom_blocks <= TOTAL - kept

    def teardown(self) -> None:
        """Once all has ended and a lease has passed, the pools are whole whatever was lost on the way."""
        self.living.clear()
        self.now += LEASE + 1
        self.ledger.expire(self.now)
        for name in NAMES:
            assert self.ledger.observe(self.make_report(name), self.now)
        self.ledger.expire(self.now)
        for known in self.ledger.replicas.values():
            assert known.bookings == {}
            assert (known.reserved_blocks, known.predicted_blocks, known.headroom_blocks) == (0, 0, TOTAL)
        assert self.ledger._replica_of == {}


TestLedger = LedgerMachine.TestCase
TestLedger.settings = settings(max_examples=150, stateful_step_count=40)
