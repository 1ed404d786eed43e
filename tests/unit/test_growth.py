"""What requests are expected to hold later, against sums over every length that was seen, one by one."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.growth import HORIZONS, UNKNOWN, Lengths, Requests, expected_use, length_class
from triattention.bounds import cdiv

BLOCK = 32


def seen(lengths: dict[int, list[int]]) -> Lengths:
    known = Lengths()
    for of_class, values in lengths.items():
        for value in values:
            known.note(of_class, value)
    known._sort()
    return known


@given(
    lengths=st.dictionaries(st.integers(1, 3), st.lists(st.integers(0, 9000), max_size=30), max_size=3),
    requests=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9000)), min_size=1, max_size=5),
)
def test_survival_is_the_share_of_longer_answers_of_the_same_class(lengths, requests):
    if not any(lengths.values()):
        lengths = {1: [5]}
    classes, written = np.array(requests).T
    survival = seen(lengths).survival(classes, written)
    for row, (of_class, tokens) in enumerate(requests):
        like = lengths.get(of_class, [])
        for column, later in enumerate(HORIZONS):
            alive = 1 + sum(length > tokens for length in like)
            still = 1 + sum(length > tokens + later for length in like)
            assert survival[row, column] == pytest.approx(still / alive)


@given(
    lengths=st.lists(st.integers(1, 5000), min_size=1, max_size=40),
    prompt=st.integers(1, 500),
    written=st.integers(0, 3000),
    bound=st.integers(1, 60),
    sequences=st.integers(1, 3),
    is_seen=st.booleans(),
)
def test_expected_use_is_the_mean_over_all_lengths_that_are_still_possible(
    lengths, prompt, written, bound, sequences, is_seen
):
    of_class = length_class(5000)
    now = min(bound, sequences * cdiv(prompt + written, BLOCK))
    row = (of_class, prompt, written * sequences, sequences, now if is_seen else -1, bound)
    use = expected_use(Requests.of([row]), BLOCK, seen({of_class: lengths}))
    possible = [length for length in lengths if length > written] + [float("inf")]
    for column, later in enumerate(HORIZONS.tolist()):
        blocks = min(bound, sequences * cdiv(prompt + written + later, BLOCK))
        held = [blocks if length > written + later else 0 for length in possible]
        assert use.mean[0, column] == pytest.approx(np.mean(held))
        assert use.variance[0, column] == pytest.approx(np.var(held), abs=1e-6)


def test_a_request_of_which_nothing_is_known_counts_with_its_whole_bound():
    lengths = seen({length_class(512): [10] * 1000})
    use = expected_use(
        Requests.of([(UNKNOWN, 100, 0, 1, -1, 17), (length_class(8192), 100, 0, 1, -1, 17)]), BLOCK, lengths
    )
    assert use.mean.max(axis=1).tolist() == [17, 17]
    assert not use.variance.any()


def test_what_holds_more_than_its_bound_keeps_it():
    use = expected_use(Requests.of([(UNKNOWN, 100, 0, 1, 20, 17)]), BLOCK, Lengths())
    assert use.mean[0].tolist() == [20] * len(HORIZONS)


def test_only_the_last_thousand_of_a_class_count():
    lengths = Lengths()
    for tokens in [8000] * 1000 + [10] * 1000:
        lengths.note(5, tokens)
    # 51 may not have been looked at yet.
    assert lengths.survival(np.array([5]), np.array([0]))[0, 1] < 0.06


@pytest.mark.parametrize(("first", "last"), [(1, 2), (3, 4), (257, 512), (513, 1024), (8193, 16384)])
def test_requests_are_alike_up_to_the_same_power_of_two(first, last):
    assert length_class(first) == length_class(last) != length_class(last + 1)
    assert length_class(first) != UNKNOWN
