"""What requests take of an engine, by request and by tier."""

import pytest

from replicas.headers import new_reservation
from replicas.meter import LATEST_COUNT_SECONDS, Meter


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def meter(clock):
    return Meter(clock)


def test_block_seconds_are_the_area_under_the_held_blocks(meter, clock):
    one = new_reservation()
    meter.begin(one, "gold", "short", 0)
    for blocks in (4, 10, 2):  # it grows and is compacted
        meter.observe({one: blocks}, {})
        clock.now += 0.5
    assert meter.usage(one) == ("gold", pytest.approx(0.5 * (4 + 10 + 2)))


def test_tiers_sum_what_ended_and_tokens_are_the_engines(meter, clock):
    one, two = new_reservation(), new_reservation()
    meter.begin(one, "gold", "short", 0)
    meter.begin(two, "free", "short", 0)
    meter.observe({one: 2, two: 1}, {})
    clock.now += 1
    meter.finish(one)
    assert meter.tiers() == {}
    meter.observe({two: 1}, {f"chatcmpl-{one}-0a1b2c3d": (30, 70)})
    gold = meter.tiers()["gold"]
    assert (gold.requests, gold.prompt_tokens, gold.output_tokens) == (1, 30, 70)
    assert gold.block_seconds == pytest.approx(2)
    assert "free" not in meter.tiers()


def test_the_sequences_of_one_prompt_share_it(meter):
    one = new_reservation()
    meter.begin(one, "t", "short", 0)
    ended = {f"{child}_cmpl-{one}-{prompt}-rnd{prompt}": (10, 5) for child in range(2) for prompt in range(3)}
    meter.finish(one)
    meter.observe({}, ended)
    assert (meter.tiers()["t"].prompt_tokens, meter.tiers()["t"].output_tokens) == (30, 30)


def test_a_request_that_never_reached_the_engine_is_counted_without_tokens(meter, clock):
    one = new_reservation()
    meter.begin(one, "t", "short", 0)
    meter.finish(one)
    meter.observe({}, {})
    assert meter.tiers() == {}
    clock.now += LATEST_COUNT_SECONDS + 0.1
    assert (meter.tiers()["t"].requests, meter.tiers()["t"].output_tokens) == (1, 0)
    assert meter._accounts == {}


def test_the_first_token_is_measured_from_the_router_and_once(meter, clock):
    one = new_reservation()
    meter.begin(one, "t", "short", 3.0)
    clock.now += 1
    meter.answered(one)
    clock.now += 50
    meter.answered(one)
    meter.finish(one)
    meter.observe({}, {f"cmpl-{one}-0-x": (1, 1)})
    pace = meter.tiers()["t"].pace
    assert set(pace) == {"short"}
    assert pace["short"].first_token_seconds == pytest.approx(4)
    assert pace["short"].first_token_counts[6] == 1  # of 2.5 s to 5 s


def test_the_time_per_token_of_every_sequence_is_summed_by_class(meter):
    one, two = new_reservation(), new_reservation()
    meter.begin(one, "t", "short", 0)
    meter.begin(two, "t", "long", 0)
    for child in range(2):
        meter.decoded(f"{child}_cmpl-{one}-0-x", 0.02)
    meter.decoded(f"chatcmpl-{two}-x", 0.7)
    meter.decoded("somebody else's", 9.9)
    for request in (one, two):
        meter.finish(request)
    meter.observe({}, {f"cmpl-{one}-0-x": (1, 2), f"chatcmpl-{two}-x": (1, 2)})
    pace = meter.tiers()["t"].pace
    assert (pace["short"].per_token_seconds, pace["short"].per_token_counts[2]) == (0.04, 2)
    assert (pace["long"].per_token_seconds, pace["long"].per_token_counts[-2]) == (0.7, 1)
