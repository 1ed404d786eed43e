"""How many requests a key may begin in a minute."""

import pytest

from replicas.turnstile import Allowance, Turnstile


def test_a_minute_has_so_many_beginnings_and_comes_back_evenly():
    turnstile, allowance = Turnstile(), Allowance(requests_per_minute=6)
    assert [turnstile.begin("a", allowance, 0.0) is None for _ in range(7)] == [True] * 6 + [False]
    assert turnstile.begin("b", allowance, 0.0) is None
    assert turnstile.begin("a", allowance, 9.9) is not None
    assert turnstile.begin("a", allowance, 10.1) is None
    assert turnstile.begin("a", allowance, 10.1) is not None


@pytest.mark.parametrize("limit", [7, 22, 100, 1999])
def test_a_whole_minute_may_begin_at_once(limit):
    turnstile, allowance = Turnstile(), Allowance(requests_per_minute=limit)
    assert sum(turnstile.begin("a", allowance, 12345.678) is None for _ in range(limit + 1)) == limit


def test_a_minute_is_kept_however_many_keys_of_other_tiers_begin_requests():
    turnstile, slow, fast = Turnstile(), Allowance(requests_per_minute=6), Allowance(requests_per_minute=6000)
    assert [turnstile.begin("slow", slow, 0.0) is None for _ in range(7)] == [True] * 6 + [False]
    for number in range(2000):
        assert turnstile.begin(f"fast {number}", fast, number / 1000) is None
    assert turnstile.begin("slow", slow, 2.0) is not None


def test_keys_with_a_full_minute_left_are_forgotten():
    turnstile = Turnstile()
    for number in range(100):
        turnstile.begin(f"fast {number}", Allowance(requests_per_minute=60), 0.0)
        turnstile.begin(f"slow {number}", Allowance(requests_per_minute=6), 0.0)
    turnstile.begin("next", Allowance(requests_per_minute=60), 5.0)
    assert len(turnstile._spent) == 101
    turnstile.begin("next", Allowance(requests_per_minute=60), 10.5)
    assert len(turnstile._spent) == 1
