"""Who is served next when several tenants' requests wait."""

import random

import pytest

from deploy.admission import Admission
from deploy.fairness import Shares
from deploy.messages import Demand, Placement
from deploy.settings import CoordinatorSettings
from deploy.tiers import Tier
from tests.unit.reports import BLOCK, report

BLOCKS = 10


class Fleet:
    """One replica that holds one request of ten blocks at a time, each for as long as its tenant's requests take."""

    def __init__(self, tiers=None, seconds=None):
        settings = CoordinatorSettings(
            queue_length=1000, queue_deadline_seconds=1e6, lease_seconds=1e6, short_request_tokens=0
        )
        self.core = Admission(settings, random.Random(0), tiers)
        self.seconds = seconds or {}
        self.now, self.sequence, self.names = 0.0, 0, 0
        self.running = None
        self.block_seconds = {}
        self.served = []
        self.report()

    def report(self, finished=(), took=None):
        self.sequence += 1
        made = report("a", self.sequence, total=BLOCKS, finished=finished)
        made.block_seconds.update(took or {})
        self.take(self.core.observe(made, self.now))

    def take(self, decisions):
        for decision in decisions:
            if isinstance(decision, Placement):
                self.running = decision.reservation

    def submit(self, tenant, count=1, tier="default", priority=0):
        for _ in range(count):
            self.names += 1
            demand = Demand(
                f"{tenant}-{self.names}", BLOCK, BLOCKS * BLOCK, tier=tier, tenant=tenant, priority=priority
            )
            self.take([self.core.submit(demand, self.now)])

    def run(self, requests):
        """Let so many requests run to their end, one after the other; their tenants in order."""
        order = []
        for _ in range(requests):
            reservation, self.running = self.running, None
            tenant = reservation.partition("-")[0]
            order.append(tenant)
            seconds = self.seconds.get(tenant, 10.0)
            self.now += seconds
            self.take(self.core.tick(self.now))
            self.block_seconds[tenant] = self.block_seconds.get(tenant, 0) + BLOCKS * seconds
            self.report((reservation,), {reservation: BLOCKS * seconds})
        return order


def test_one_request_does_not_wait_behind_another_tenants_hundred():
    fleet = Fleet()
    fleet.submit("heavy", 100)
    fleet.run(20)
    fleet.submit("light")
    assert "light" in fleet.run(3)


def test_tenants_with_backlogs_are_served_in_turn():
    fleet = Fleet()
    fleet.submit("before")
    fleet.run(1)
    fleet.submit("one", 30)
    fleet.run(10)
    fleet.submit("two", 30)
    order = fleet.run(21)
    assert 9 <= order.count("two") <= 12


def test_block_seconds_follow_the_shares_also_where_requests_differ_in_length():
    tiers = {"gold": Tier(share=3), "free": Tier(share=1)}
    fleet = Fleet(tiers, {"g": 40.0, "f": 5.0})
    fleet.submit("f", 5, "free")
    fleet.submit("g", 5, "gold")
    # Both always have requests waiting, and are charged for what theirs were seen to take.
    for _ in range(200):
        for tenant in fleet.run(1):
            fleet.submit(tenant, 1, {"g": "gold", "f": "free"}[tenant])
    assert fleet.block_seconds["g"] / fleet.block_seconds["f"] == pytest.approx(3, rel=0.25)


def test_who_used_an_idle_fleet_owes_nothing_for_it():
    fleet = Fleet()
    for _ in range(50):
        fleet.submit("early")
        fleet.run(1)
    fleet.submit("late", 10)
    fleet.submit("early", 10)
    assert fleet.run(10).count("early") >= 4


def test_a_tier_with_a_latency_target_is_due_earlier():
    fleet = Fleet({"gold": Tier(first_token_target_seconds=1)})
    fleet.submit("x")
    fleet.submit("default")
    fleet.now += 2
    fleet.submit("gold", tier="gold")
    assert fleet.run(2)[1] == "gold"


@pytest.mark.parametrize("keys", [1, 10, 40])
def test_a_step_of_priority_is_worth_aging_seconds_however_many_keys_queue(keys):
    fleet = Fleet(seconds=dict.fromkeys([f"key {n}" for n in range(keys)] + ["batch", "before"], 0.1))
    fleet.submit("before")
    for key in range(keys):
        fleet.submit(f"key {key}", 5)
    for _ in range(800):
        for tenant in fleet.run(1):
            fleet.submit(tenant)
    fleet.submit("batch", priority=1)
    came = fleet.now
    while "batch" not in (served := fleet.run(1)):
        fleet.submit(served[0])
    assert 5 < fleet.now - came < 10 + 0.1 * keys + 5


def test_a_step_of_priority_is_worth_aging_seconds_where_every_key_sends_one_request():
    fleet = Fleet(seconds=dict.fromkeys(["urgent", "batch"] + [f"key {key}" for key in range(1500)], 0.1))
    for key in range(50):
        fleet.submit(f"key {key}")
    came = {}
    for key in range(50, 1500):
        fleet.submit(f"key {key}")
        if key == 1000:
            fleet.submit("urgent", priority=-1)
            came["urgent"] = fleet.now
            fleet.submit("batch", priority=1)
            came["batch"] = fleet.now
        for tenant in fleet.run(1):
            if tenant in ("urgent", "batch"):
                came[tenant] = fleet.now - came[tenant]
    # Everybody waits for the fifty that came before: five seconds.
    assert came["urgent"] < 1
    assert 10 < came["batch"] < 20


def test_keys_of_a_tier_that_is_due_earlier_do_not_wait_behind_each_other():
    fleet = Fleet({"gold": Tier(priority=-1)}, {"heavy": 0.1, "light": 0.1, "default": 0.1})
    fleet.submit("default")
    fleet.submit("heavy", 200, tier="gold", priority=-1)
    fleet.submit("default", 200)
    fleet.run(100)
    fleet.submit("light", tier="gold", priority=-1)
    assert "light" in fleet.run(3)


def test_a_request_that_leaves_the_queue_is_not_charged():
    fleet = Fleet()
    fleet.submit("x")
    fleet.submit("left", 50)
    for number in range(2, 52):
        fleet.core.release(f"left-{number}", fleet.now)
    fleet.submit("other", 2)
    fleet.submit("left")
    assert "left" in fleet.run(3)


def test_virtual_time_does_not_pass_the_first_in_the_queue():
    fair = Shares()
    fair.advance(0, None)
    first = fair.charge("r1", ("a", 0), 1, 10, 10)
    fair.advance(100, first)
    assert fair.charge("r2", ("b", 0), 1, 10, 10) == first


def test_what_seconds_were_worth_is_remembered():
    fair = Shares()
    fair.advance(100, None)
    assert fair.passed_in(10) == 10, "before the first request: with the clock"
    for now in range(101, 111):
        fair.advance(now, None)
    first = fair.charge("r", ("a", 0), 1, 10, 10)
    for now in range(111, 131):
        fair.advance(now, first)
    assert [fair.passed_in(seconds) for seconds in (5, 20, 24.5, 40)] == [0, 0, 4.5, 20]


def test_flows_that_owe_nothing_are_forgotten():
    fair = Shares()
    fair.advance(0, None)
    for number in range(1000):
        fair.charge(f"r{number}", (f"tenant {number}", 0), 1, 1, 100)
    fair.advance(1000, None)
    assert fair._paid_until == {}


def test_a_tenants_requests_are_known_until_each_is_settled():
    fair = Shares()
    fair.advance(0, None)
    for number in range(4):
        fair.charge(f"r{number}", (f"tenant {number % 2}", 0), 1, 1, 100)
    fair.settle("r0", 1, 100)
    assert fair.of_tenant == {"tenant 0": {"r2"}, "tenant 1": {"r1", "r3"}}
    for number in range(4):
        fair.settle(f"r{number}", 1, 100)
    assert fair.of_tenant == {}


@pytest.mark.parametrize("is_settled", [False, True])
def test_a_request_that_goes_on_under_another_reservation_keeps_its_start_and_is_charged_once(is_settled):
    fair = Shares()
    fair.advance(0, None)
    start = fair.charge("first", ("a", 0), 1, 10, 10)
    fair.charge("later", ("a", 0), 1, 10, 10)
    if is_settled:
        fair.settle("first", 0, 10)
    assert fair.charge_again("again", "first", 10) == start
    assert fair.charge_again("more", "first", 10) is None
    assert fair.of_tenant == {"a": {"again", "later"}}
    fair.settle("first", 100, 10)
    fair.settle("again", 100, 10)
    assert fair.charge("next", ("a", 0), 1, 10, 10) == pytest.approx(start + 10 + 5)
    assert fair.charges.keys() == {"later", "next"}


def test_of_requests_that_have_ended_the_latest_are_remembered(monkeypatch):
    monkeypatch.setattr("deploy.fairness.REMEMBERED_ENDS", 2)
    fair = Shares()
    fair.advance(0, None)
    for name in ("r1", "r2", "r3"):
        fair.charge(name, ("a", 0), 1, 10, 10)
        fair.settle(name, 0, 10)
    assert fair.charge_again("again", "r1", 10) is None
    assert fair.charge_again("again", "r2", 10) is not None
