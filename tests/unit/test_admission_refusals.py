"""Who is refused, with which status and sentence, and when to come back; who gives way where the queue is full."""

import random

import pytest

from deploy.admission import Admission
from deploy.messages import Demand, Refusal
from deploy.settings import CoordinatorSettings
from deploy.tiers import Tier
from tests.unit.reports import report
from tests.unit.test_admission import LONG, SHORT, admission, long_request, placed_on, short_request


def test_what_can_never_fit_is_refused_at_once_even_when_the_queue_has_room():
    core = admission()
    core.observe(report(total=30), 0)
    refusal = core.submit(long_request("r"), 0)
    assert isinstance(refusal, Refusal)
    assert refusal.status == 400
    assert core.snapshot(0).rejections["over_kv_pool"] == 1


def test_a_request_that_waits_for_the_first_replica_is_refused_when_that_one_can_never_take_it():
    core = admission()
    assert core.submit(long_request("r"), 0) is None
    (refusal,) = core.observe(report(total=30), 1)
    assert isinstance(refusal, Refusal)
    assert refusal.status == 400
    assert core.snapshot(1).queue_length == {"short": 0, "long": 0}


def test_without_any_replica_a_request_waits_and_is_placed_by_the_first_report():
    core = admission()
    assert core.submit(long_request("r"), 0) is None
    (decision,) = core.observe(report(), 5)
    assert placed_on(decision) == "a"


def test_past_the_deadline_a_request_gets_503_and_leaves_the_queue():
    core = admission()
    core.observe(report(free=0), 0)
    core.submit(long_request("r"), 0)
    core.observe(report(sequence=2, free=0), 59)
    assert core.tick(59.9) == []
    (refusal,) = core.tick(60)
    assert isinstance(refusal, Refusal)
    assert (refusal.status, refusal.reason) == (503, "queue_deadline")
    assert refusal.retry_after_seconds is not None
    assert core.tick(61) == []


def test_past_the_deadline_without_replicas_the_reason_says_so():
    core = admission()
    core.submit(long_request("r"), 0)
    (refusal,) = core.tick(60)
    assert isinstance(refusal, Refusal)
    assert (refusal.status, refusal.reason) == (503, "no_replica")


def test_a_full_queue_still_lets_in_what_fits_now():
    core = admission(queue_length=1)
    core.observe(report(free=10), 0)
    core.submit(long_request("long"), 0)
    assert placed_on(core.submit(short_request("short"), 0)) == "a"


def test_a_full_queue_gives_up_who_is_due_last_and_not_who_comes_last():
    core = Admission(
        CoordinatorSettings(queue_length=4, queue_deadline_seconds=60, short_request_tokens=256),
        random.Random(0),
        {"gold": Tier(priority=-1, share=4)},
    )
    core.observe(report(free=0), 0)
    decisions = [core.submit(long_request(f"many{i}"), 0) for i in range(6)]
    assert [d is None for d in decisions] == [True] * 4 + [False] * 2
    assert core.submit(Demand("gold", 100, LONG, tier="gold", tenant="g"), 0) is None
    assert core.submit(Demand("short", 32, SHORT, tenant="s"), 0) is None
    refusals = core.tick(0.1)
    assert [(r.reservation, r.status, r.reason) for r in refusals] == [
        ("many3", 429, "queue_full"), ("many2", 429, "queue_full")
    ]  # fmt: skip
    assert core.tick(0.2) == []
    assert core.snapshot(1).queue_length == {"short": 1, "long": 3}


@pytest.mark.parametrize("seconds", [2, 50])
def test_a_full_queue_gives_up_who_is_ahead_of_its_share_though_its_class_is_far_behind(seconds):
    """The long ones' virtual time stands still while the short ones' runs on."""
    core = admission(queue_length=4)
    core.observe(report(free=0), 0)
    for number in range(3):
        core.submit(Demand(f"long{number}", 100, LONG, tenant="l"), 0)
    for now in range(seconds):
        core.tick(now)
        core.observe(report(sequence=2 + now, free=0), now)
    assert core.submit(Demand("waits", 32, SHORT, tenant="s"), seconds) is None
    core.tick(seconds + 1)
    assert core.submit(Demand("new", 32, SHORT, tenant="t"), seconds + 1) is None
    assert [r.reservation for r in core.tick(seconds + 1)] == ["long2"]
    assert [core.submit(Demand(f"more{i}", 100, LONG, tenant="l"), seconds + 1).reservation for i in range(9)] == [
        f"more{i}" for i in range(9)
    ]
    assert core.snapshot(seconds + 1).queue_length == {"short": 2, "long": 2}


def test_a_minute_of_requests_is_counted_for_the_whole_fleet_and_each_request_once():
    core = Admission(CoordinatorSettings(), random.Random(0), {"gold": Tier(requests_per_minute=2)})
    core.observe(report(total=10_000), 0)

    def submit(name, now, **values):
        return core.submit(Demand(name, 32, SHORT, tier="gold", tenant="g", **values), now)

    placed_on(submit("r1", 0))
    placed_on(submit("r2", 0))
    placed_on(submit("r2 again", 0, former="r2"))
    refusal = submit("r3", 0)
    assert isinstance(refusal, Refusal)
    assert (refusal.status, refusal.reason, refusal.retry_after_seconds) == (429, "requests_per_minute", 30)
    assert core.snapshot(0).tiers["gold"].counts.rejections["requests_per_minute"] == 1
    core.observe(report(sequence=2, total=10_000), 31)
    placed_on(submit("r4", 31))


def test_retry_after_follows_the_observed_release_rate():
    def retry_after(seconds_per_release):
        core = admission(queue_length=0)
        core.observe(report(total=100, free=40), 0)
        now = 0.0
        for i in range(10):
            assert placed_on(core.submit(long_request(f"r{i}"), now)) == "a"
            now += seconds_per_release
            core.release(f"r{i}", now)
            core.observe(report(sequence=2 + i, total=100, free=40), now)
        core.observe(report(sequence=99, total=100, free=0), now)
        refusal = core.submit(long_request("refused"), now)
        assert isinstance(refusal, Refusal)
        return refusal.retry_after_seconds

    assert retry_after(1) == 1  # 40 blocks per second, 40 wanted
    assert 8 <= retry_after(10) <= 15


def test_a_reservation_id_cannot_be_used_twice():
    core = admission()
    core.observe(report(free=45), 0)
    core.submit(long_request("booked"), 0)
    core.submit(long_request("queued"), 0)
    for name in ("booked", "queued"):
        with pytest.raises(ValueError, match="is in use"):
            core.submit(long_request(name), 1)
