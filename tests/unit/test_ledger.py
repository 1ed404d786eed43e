"""The ledger: what is reported, reserved and predicted stays apart, and nothing leaks."""

import pytest

from deploy.ledger import Ledger
from tests.unit.reports import BLOCK, book, compression, demand, report
from triattention.bounds import blocks_bound


@pytest.fixture
def ledger():
    return Ledger(lease_seconds=30, stale_report_seconds=2, watermark_blocks=4)


def state(ledger, replica="a", now=0.0):
    (found,) = [r for r in ledger.snapshot(now) if r.replica == replica]
    return found


def test_a_booking_is_reserved_whole_until_a_report_shows_it(ledger):
    ledger.observe(report(), 0)
    book(ledger, demand("x"), "a", 20, 0)
    before = state(ledger)
    assert (before.reserved_blocks, before.predicted_blocks, before.headroom_blocks) == (20, 0, 76)
    ledger.observe(report(sequence=2, held={"x": 5}), 1)
    after = state(ledger)
    assert (after.reserved_blocks, after.predicted_blocks, after.headroom_blocks) == (0, 15, 76)


def test_reported_free_blocks_are_never_overwritten_by_what_was_booked_or_released(ledger):
    ledger.observe(report(held={"x": 30}), 0)
    book(ledger, demand("y"), "a", 20, 0)
    ledger.release("x", 0)
    assert state(ledger).engine.free_blocks == 70


def test_a_released_request_counts_as_free_only_when_the_replica_says_so(ledger):
    ledger.observe(report(), 0)
    book(ledger, demand("x"), "a", 40, 0)
    ledger.observe(report(sequence=2, held={"x": 40}), 0)
    ledger.release("x", 0)
    assert state(ledger).headroom_blocks == 56
    ledger.observe(report(sequence=3), 0)
    assert state(ledger).headroom_blocks == 96


def test_growth_is_never_negative_when_a_request_holds_more_than_its_bound(ledger):
    ledger.observe(report(), 0)
    book(ledger, demand("x"), "a", 10, 0)
    ledger.observe(report(sequence=2, held={"x": 13}), 0)
    assert state(ledger).predicted_blocks == 0
    assert state(ledger).drift_blocks == 3


def test_a_request_that_another_replica_shows_is_booked_there_alone(ledger):
    """HAProxy sends by its own choice while no router answers it, and the router's placement is then void."""
    ledger.observe(report(), 0)
    ledger.observe(report("b"), 0)
    book(ledger, demand("x"), "a", 20, 0)
    ledger.observe(report("b", sequence=2, held={"x": 5}), 1)
    assert (state(ledger, "a").reservations, state(ledger, "a").headroom_blocks) == (0, 96)
    assert (state(ledger, "b").reservations, state(ledger, "b").engine.free_blocks) == (1, 95)
    ledger.observe(report("b", sequence=3, finished=("x",)), 2)
    ledger.expire(100)
    assert state(ledger, "a").reservations == state(ledger, "b").reservations == 0


def test_release_is_idempotent(ledger):
    ledger.observe(report(), 0)
    book(ledger, demand("x"), "a", 20, 0)
    assert ledger.release("x", 0)
    assert not ledger.release("x", 0)
    assert not ledger.release("never booked", 0)
    assert (state(ledger).reserved_blocks, state(ledger).headroom_blocks) == (0, 96)


def test_a_finished_request_is_released_by_the_report_and_does_not_come_back_with_a_late_one(ledger):
    ledger.observe(report(), 0)
    book(ledger, demand("x"), "a", 20, 0)
    ledger.observe(report(sequence=2, held={"x": 20}, finished=("x",)), 0)
    ledger.observe(report(sequence=3, held={"x": 20}, finished=("x",)), 0)
    assert state(ledger).reservations == 0
    assert state(ledger).predicted_blocks == 0


def test_duplicate_and_overtaken_reports_are_ignored_and_do_not_make_a_replica_fresh(ledger):
    ledger.observe(report(sequence=5, free=50), 0)
    assert not ledger.observe(report(sequence=5, free=99), 10)
    assert not ledger.observe(report(sequence=4, free=99), 10)
    assert state(ledger).engine.free_blocks == 50
    assert ledger.reports_ignored == 2
    assert not ledger.fresh(10).any()


def test_an_end_told_by_an_overtaken_report_counts(ledger):
    ledger.observe(report(), 0)
    book(ledger, demand("x"), "a", 20, 0)
    ledger.observe(report(sequence=3), 0)
    ledger.observe(report(sequence=2, finished=("x",)), 0)
    assert "x" not in ledger


def test_a_new_epoch_drops_what_the_old_engine_had(ledger):
    ledger.observe(report(), 0)
    book(ledger, demand("old"), "a", 20, 0)
    book(ledger, demand("arrived at the new engine"), "a", 10, 0)
    ledger.observe(report(epoch="second", held={"arrived at the new engine": 2}), 1)
    assert "old" not in ledger
    assert state(ledger).predicted_blocks == 8


def test_a_late_report_of_a_past_epoch_is_ignored(ledger):
    ledger.observe(report(sequence=7), 0)
    ledger.observe(report(epoch="second", free=40), 1)
    assert not ledger.observe(report(sequence=8, free=100), 1)
    assert state(ledger).engine.free_blocks == 40


def test_a_late_report_of_a_past_epoch_that_a_restarted_coordinator_believes_does_not_shut_the_engine_out(ledger):
    ledger.observe(report(epoch="second"), 0)
    assert ledger.observe(report(epoch="first", sequence=9), 0)  # it cannot know which is the later one
    assert not ledger.observe(report(epoch="second", sequence=2), 1)
    ledger.expire(31)
    assert ledger.observe(report(epoch="second", sequence=3), 31)


def test_a_request_that_never_arrives_is_released_by_its_lease(ledger):
    ledger.observe(report(), 0)
    book(ledger, demand("x"), "a", 20, 0)
    ledger.expire(30)
    assert "x" in ledger
    ledger.expire(30.1)
    assert "x" not in ledger
    assert (state(ledger).headroom_blocks, ledger.lease_expirations) == (96, 1)


def test_a_running_request_outlives_its_lease(ledger):
    ledger.observe(report(), 0)
    book(ledger, demand("x"), "a", 20, 0)
    for second in range(1, 100):
        ledger.observe(report(sequence=second + 1, held={"x": 5}), second)
        ledger.expire(second)
    assert "x" in ledger


def test_a_preempted_request_is_reserved_whole_again(ledger):
    ledger.observe(report(), 0)
    book(ledger, demand("x"), "a", 20, 0)
    ledger.observe(report(sequence=2, held={"x": 12}), 0)
    ledger.observe(report(sequence=3), 0)
    assert state(ledger).reserved_blocks == 20


def test_after_a_restart_the_first_report_rebuilds_the_ledger(ledger):
    ledger.observe(report(held={"x": 10}, compression=compression()), 0)
    # What it holds may all be pinned prompt; behind that it can grow by what lives behind any prompt.
    growth = blocks_bound(0, 8192, BLOCK, compression(), in_flight_tokens=2)
    assert growth < 20
    assert (state(ledger).reservations, state(ledger).predicted_blocks) == (1, growth)
    ledger.observe(report(sequence=2, finished=("x",), compression=compression()), 1)
    assert state(ledger).reservations == 0


def test_after_a_restart_a_request_that_has_ended_already_is_not_booked(ledger):
    ledger.observe(report(held={"x": 10}, finished=("x",)), 0)
    assert state(ledger).reservations == 0


def test_a_released_request_that_runs_on_for_longer_than_a_lease_is_booked_again(ledger):
    ledger.observe(report(), 0)
    book(ledger, demand("x"), "a", 20, 0)
    ledger.release("x", 0)
    ledger.observe(report(sequence=2, held={"x": 10}), 1)
    assert state(ledger).reservations == 0
    ledger.expire(31)
    ledger.observe(report(sequence=3, held={"x": 10}), 31)
    assert state(ledger).reservations == 1


def test_held_blocks_without_a_reservation_show_as_drift(ledger):
    ledger.observe(report(free=70), 0)
    assert state(ledger).drift_blocks == 30


def test_a_removed_replica_takes_its_bookings_along_and_is_not_revived_by_a_late_report(ledger):
    ledger.observe(report(), 0)
    book(ledger, demand("x"), "a", 20, 0)
    ledger.remove("a", 0)
    assert "x" not in ledger
    assert not ledger.observe(report(sequence=2), 0.1)
    assert ledger.snapshot(0.1) == ()


def test_a_replica_that_was_only_cut_off_comes_back(ledger):
    ledger.observe(report(), 0)
    ledger.remove("a", 120)
    ledger.expire(200)
    assert ledger.observe(report(sequence=900), 200)
    assert ledger.fresh(200).all()


def test_headroom_below_zero_is_shown_as_it_is(ledger):
    ledger.observe(report(total=10), 0)
    book(ledger, demand("x"), "a", 20, 0)
    assert state(ledger).headroom_blocks == -14


EAGER = compression().model_copy(update={"reserve_growth": False})
BOUND = blocks_bound(100, 8100, BLOCK, EAGER, in_flight_tokens=2)


def one_that_has_seen(tokens: int, quantile: float = 0.95, times: int = 200) -> Ledger:
    """A ledger before which so many answers of that length have ended."""
    ledger = Ledger(lease_seconds=30, stale_report_seconds=2, watermark_blocks=0, growth_quantile=quantile)
    ledger.observe(report(compression=EAGER), 0)
    for number in range(times):
        book(ledger, demand(f"e{number}"), "a", BOUND, 0)
        finished = report(
            sequence=number + 2, finished=(f"e{number}",), output_tokens={f"e{number}": tokens}, compression=EAGER
        )
        ledger.observe(finished, 0)
    return ledger


def test_where_answers_end_early_less_than_the_bound_is_booked_and_never_less_than_the_prompt():
    ledger = one_that_has_seen(tokens=60)
    book(ledger, demand("x"), "a", BOUND, 0)
    # A prompt of 100 tokens takes 4 blocks, and 60 more tokens end in the fifth.
    assert 4 <= state(ledger).reserved_blocks <= 6 < BOUND
    assert 100 - 10 < state(ledger).headroom_blocks <= 96


def test_what_is_booked_is_the_whole_bound_where_answers_outlast_it_or_the_settings_want_it_so():
    for ledger in (one_that_has_seen(tokens=8000), one_that_has_seen(tokens=60, quantile=1.0)):
        book(ledger, demand("x"), "a", BOUND, 0)
        assert state(ledger).headroom_blocks == 100 - BOUND


def test_where_the_engine_reserves_growth_the_whole_bound_is_booked_whatever_was_seen():
    ledger = one_that_has_seen(tokens=60)
    ledger.observe(report("b", compression=compression()), 0)
    book(ledger, demand("x"), "b", BOUND, 0)
    assert state(ledger, "b").headroom_blocks == 100 - BOUND


def test_a_request_that_has_outlived_all_others_may_grow_to_its_bound():
    ledger = one_that_has_seen(tokens=60)
    book(ledger, demand("x"), "a", BOUND, 0)
    grown = report(sequence=1000, held={"x": 6}, output_tokens={"x": 80}, compression=EAGER)
    ledger.observe(grown, 0)
    assert (state(ledger).headroom_blocks, state(ledger).predicted_blocks) == (100 - BOUND, BOUND - 6)


def test_the_surer_it_shall_be_the_more_is_kept_free():
    rooms = []
    for quantile in (0.6, 0.9, 0.99):
        ledger = one_that_has_seen(tokens=1000, quantile=quantile, times=100)
        for _ in range(100):
            ledger.lengths.note(ledger.class_on(ledger.table.kinds[0], demand("x")), 20)
        for number in range(5):
            book(ledger, demand(f"x{number}"), "a", BOUND, 0)
        rooms.append(state(ledger).headroom_blocks)
    assert rooms[0] > rooms[1] > rooms[2] >= 100 - 5 * BOUND
