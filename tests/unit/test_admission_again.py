"""Requests that come back: because their replica failed them, or because it was gone when they were sent there."""

from dataclasses import replace

import pytest

from tests.unit.reports import report
from tests.unit.test_admission import admission, long_request, placed_on, replica_state


def test_a_request_whose_replica_failed_goes_to_another_under_a_fresh_reservation():
    core = admission()
    core.observe(report("fails", total=200), 0)
    core.observe(report("other", total=100), 0)
    assert placed_on(core.submit(long_request("first"), 0)) == "fails"
    again = core.failed("first", long_request("second"), 1)
    assert placed_on(core.submit(again, 1)) == "other"
    assert replica_state(core, "fails", 1).reserved_blocks == 0
    assert core.snapshot(1).retries == 1


@pytest.mark.parametrize(("successor", "goes_to"), [(2, "successor"), (9, "only")])
def test_a_failed_request_returns_to_its_replica_only_if_that_lives_on_and_no_other_comes(successor, goes_to):
    core = admission()
    core.observe(report("only", total=200), 0)
    core.submit(long_request("first"), 0)
    assert core.submit(core.failed("first", long_request("second"), 1), 1) is None
    decisions = []
    for second in range(1, 12):
        decisions += core.observe(report("only", sequence=1 + second, total=200), second)
        if second == successor:
            decisions += core.observe(report("successor", total=200), second)
    assert [placed_on(decision) for decision in decisions] == [goes_to]


def test_a_replica_that_failed_a_request_gets_no_other_until_it_reports():
    core = admission()
    core.observe(report("suspect", total=200), 0)
    core.observe(report("other", total=50), 0)
    core.submit(long_request("first"), 0)
    core.failed("first", long_request("second"), 0)
    assert not replica_state(core, "suspect").fresh
    assert placed_on(core.submit(long_request("third"), 0)) == "other"
    core.observe(report("suspect", sequence=2, total=200), 0.1)
    assert placed_on(core.submit(long_request("fourth"), 0.1)) == "suspect"


def test_a_retry_of_a_reservation_that_nobody_knows_is_placed_all_the_same():
    core = admission()
    core.observe(report(), 0)
    assert placed_on(core.submit(core.failed("of before a restart", long_request("r"), 0), 0)) == "a"


def comes_back(core, now, way):
    """Placed as `early`, a moment before others of its tenant came; then it comes back."""
    core.observe(report(free=40), 0)
    placed_on(core.submit(long_request("early"), 0))
    core.submit(long_request("later"), 1)
    demand = replace(long_request("again"), waited_seconds=now)
    if way == "released":
        core.release("early", now)
        demand = replace(demand, former="early")
    else:
        if way == "failed and reported":
            core.observe(report(sequence=2, free=0, finished=("early",)), now)
        demand = core.failed("early", demand, now)
    # Between the two calls every lease may be looked at.
    core.tick(now)
    return core.submit(demand, now)


@pytest.mark.parametrize("way", ["released", "failed", "failed and reported"])
def test_a_request_that_comes_back_keeps_its_place(way):
    core = admission()
    core.observe(report("b", free=0), 0)
    assert comes_back(core, 5, way) is None
    core.observe(report("b", sequence=2, free=0), 5)
    assert [d.reservation for d in core.observe(report("b", sequence=3, free=40), 5)] == ["again"]


@pytest.mark.parametrize("way", ["released", "failed"])
def test_a_request_that_comes_back_counts_as_waiting_only_for_its_new_place(way):
    core = admission()
    core.observe(report("b", free=0), 0)
    comes_back(core, 5, way)
    core.observe(report("b", sequence=2, free=40), 7)
    tiers = core.snapshot(7).tiers
    assert [tiers["default"].counts.waits["long"].sum_seconds, tiers["default"].counts.admissions] == [2, 2]


def test_a_request_that_comes_back_has_its_first_deadline():
    core = admission()
    core.tick(0)
    assert comes_back(core, 50, "released") is None
    core.observe(report(sequence=2, free=0), 59)
    assert core.tick(59.9) == []
    assert [refusal.reservation for refusal in core.tick(60)] == ["again"]
