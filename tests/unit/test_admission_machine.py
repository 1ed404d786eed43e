"""A state machine against the queue: what is placed where, checked against the rules in plain Python, one by one.

The rules, over replicas of several kinds: only a fresh replica with the headroom gets a request; nobody takes
headroom on a replica that a request ahead of it in its class could ever use; and nobody waits who could be placed.
"""

import random
from dataclasses import replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from deploy.admission import Admission
from deploy.messages import Demand, Placement
from deploy.queue import LONG, SHORT
from deploy.settings import CoordinatorSettings
from tests.unit.reports import compression, report
from triattention.bounds import blocks_bound

KINDS = {
    "small": {"total": 20},
    "large": {"total": 60},
    "large blocks": {"total": 30, "block_size": 64},
    "compressed": {"total": 30, "compression": compression(budget=64, interval=32)},
    "short contexts": {"total": 60, "max_model_len": 400},
}
NAMES = tuple(f"{kind}/{number}" for kind in KINDS for number in (1, 2))
STALE = 2.0


class AdmissionMachine(RuleBasedStateMachine):
    @initialize(deadline=st.sampled_from([1e9, 20.0]), names=st.sets(st.sampled_from(NAMES), min_size=1))
    def start(self, deadline: float, names: set[str]) -> None:
        self.deadline = deadline
        self.now = 0.0
        self.sequence = 0
        self.numbers = 0
        self.epochs = dict.fromkeys(NAMES, 0)
        self.placed: dict[str, str] = {}
        self.held: dict[str, int] = {}
        self.core = Admission(
            CoordinatorSettings(
                queue_length=12, queue_deadline_seconds=deadline, stale_report_seconds=STALE,
                lease_seconds=1e9, short_request_tokens=150, aging_seconds=5,
            ),
            random.Random(0),
        )  # fmt: skip
        for name in sorted(names):
            self.report(name, data=None)

    # -- the rules in plain Python -------------------------------------------------------------------

    def need(self, demand: Demand, name: str) -> int:
        made = self.core._ledger.replicas[name].report
        return demand.sequences * max(
            1,
            blocks_bound(
                demand.prompt_tokens,
                demand.total_tokens,
                made.engine.block_size,
                made.limits.compression,
                made.engine.in_flight_tokens,
            ),
        )

    def could_ever_fit(self, demand: Demand, name: str) -> bool:
        made = self.core._ledger.replicas[name].report
        is_allowed = demand.total_tokens <= made.limits.max_model_len
        return is_allowed and self.need(demand, name) <= made.engine.total_blocks

    def fits_now(self, demand: Demand, name: str) -> bool:
        known = self.core._ledger.replicas[name]
        is_fresh = self.now - known.reported_at <= STALE
        return is_fresh and self.could_ever_fit(demand, name) and self.need(demand, name) <= known.headroom_blocks

    def check(self, before: list, decisions: list) -> None:
        """Every decision follows the rules; `before` is the queue as it was, with what came since at its place."""
        waiting = list(self.core._queue)
        for decision in decisions:
            if not isinstance(decision, Placement):
                continue
            name = decision.replica
            known = self.core._ledger.replicas[name]
            (placed,) = [w for w in before if w.demand.reservation == decision.reservation]
            assert self.now - known.reported_at <= STALE
            assert known.bookings[decision.reservation].bound_blocks == self.need(placed.demand, name)
            ahead = before[: before.index(placed)]
            for other in ahead:
                if other in waiting and other.kind == placed.kind:
                    assert not self.could_ever_fit(other.demand, name), "overtaken by one behind it"
            self.placed[decision.reservation] = name
        if self.deadline == 1e9:
            self.nobody_waits_who_could_be_placed()

    def nobody_waits_who_could_be_placed(self) -> None:
        waiting = list(self.core._queue)
        for position, one in enumerate(waiting):
            ahead = [other for other in waiting[:position] if other.kind == one.kind]
            overdue = any(self.now - other.since >= self.deadline / 2 for other in waiting if other.kind != SHORT)
            if one.kind == SHORT and overdue:
                continue  # one replica may be closed to it; `test_admission.py` says which
            for name in self.core._ledger.replicas:
                if self.fits_now(one.demand, name):
                    assert any(self.could_ever_fit(other.demand, name) for other in ahead), (one, name)

    # -- what happens --------------------------------------------------------------------------------

    @rule(prompt=st.integers(1, 300), output=st.integers(1, 500), priority=st.integers(-1, 1), n=st.integers(1, 2))
    def submit(self, prompt: int, output: int, priority: int, n: int) -> None:
        self.numbers += 1
        demand = Demand(f"r{self.numbers}", prompt, prompt + output, sequences=n, priority=priority)
        before: list = []
        queue = self.core._queue
        add = queue.add

        def see(waiting: object) -> None:
            add(waiting)
            before.extend(queue)

        queue.add = see
        able = [name for name in self.core._ledger.replicas if self.could_ever_fit(demand, name)]
        decision = self.core.submit(demand, self.now)
        queue.add = add
        is_refused_for_good = decision is not None and getattr(decision, "status", None) == 400
        assert is_refused_for_good == (not able and bool(self.core._ledger.replicas))
        self.check(before, [] if decision is None else [decision])

    @rule(name=st.sampled_from(NAMES), data=st.data())
    def report(self, name: str, data: st.DataObject | None) -> None:
        """Some of what is booked there has arrived and grown; the report is true."""
        self.sequence += 1
        known = self.core._ledger.replicas.get(name)
        bookings = {} if known is None else known.bookings
        held = {r: data.draw(st.integers(0, b.bound_blocks)) for r, b in bookings.items()} if data else {}
        made = report(name, self.sequence, epoch=str(self.epochs[name]), held=held, **KINDS[name.split("/")[0]])
        before = list(self.core._queue)
        self.check(before, self.core.observe(made, self.now))

    @precondition(lambda self: self.numbers)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        reservation = f"r{data.draw(st.integers(1, self.numbers))}"
        before = [w for w in self.core._queue if w.demand.reservation != reservation]
        self.check(before, self.core.release(reservation, self.now))

    @rule(name=st.sampled_from(NAMES))
    def restart(self, name: str) -> None:
        self.epochs[name] += 1
        self.report(name, data=None)

    @rule(name=st.sampled_from(NAMES))
    def remove(self, name: str) -> None:
        before = list(self.core._queue)
        self.epochs[name] += 1  # its successor
        self.check(before, self.core.remove_replica(name, self.now))

    @rule(seconds=st.floats(0.1, 4))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.core._advance(self.now)
        self.core._queue.age()
        # Twice: those who give up in the first leave their claims to the second.
        for _ in range(2):
            before = list(self.core._queue)
            self.check(before, self.core.tick(self.now))
        self.nobody_waits_who_could_be_placed()

    # -- what always holds ---------------------------------------------------------------------------

    @invariant()
    def the_queue_is_in_order_and_counts_its_blocks(self) -> None:
        waiting = list(self.core._queue)
        for kind in (SHORT, LONG):
            lines = self.core._queue._lines[kind].values()
            places = {w: line.place(position) for line in lines for position, w in enumerate(line.waiting)}
            ordered = [places[w] for w in self.core._queue.of(kind)]
            assert ordered == sorted(places.values())
        assert sum(self.core._queue.lengths.values()) == len(waiting)
        assert self.core._queue.blocks == sum(w.blocks for w in waiting)
        assert len(waiting) <= 12
        assert all(w.demand.reservation in self.core._queue for w in waiting)

    @invariant()
    def the_table_shows_what_the_ledger_knows(self) -> None:
        ledger = self.core._ledger
        table = ledger.table
        assert table.names == list(ledger.replicas)
        for row, known in enumerate(ledger.replicas.values()):
            kind = table.kinds[table.kind[row]]
            assert (kind.limits, kind.block_size) == (known.report.limits, known.report.engine.block_size)
            assert table.usable[row] == known.report.engine.total_blocks
            assert table.headroom[row] == known.headroom_blocks
            assert table.requests[row] == known.requests
            assert table.heard_at[row] == known.reported_at
        for kind, usable in table.largest:
            pools = [
                k.report.engine.total_blocks
                for k in ledger.replicas.values()
                if replace(kind, limits=k.report.limits, block_size=k.report.engine.block_size) == kind
            ]
            assert max(pools) == usable


TestAdmission = AdmissionMachine.TestCase
TestAdmission.settings = settings(max_examples=120, stateful_step_count=40)
