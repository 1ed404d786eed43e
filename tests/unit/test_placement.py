"""Which of the replicas that fit."""

import random

import numpy as np

from deploy.placement import POLICIES, Candidates, least_loaded_of_two, most_headroom

RNG = random.Random(0)


def candidates(*rows, affinity=None, local=None):
    """Each (headroom, need, requests); `affinity` and `local` by candidate."""
    columns = [np.array(column) for column in zip(*rows, strict=True)]
    ties = np.array(affinity or [0] * len(rows)), np.array(local or [False] * len(rows))
    return Candidates(*columns, *ties)


def test_long_requests_go_to_the_replica_with_the_most_headroom():
    near_full, roomy = (20, 18, 0), (90, 18, 9)
    assert most_headroom(candidates(near_full, roomy), RNG) == 1


def test_headroom_counts_in_requests_where_block_sizes_differ():
    large_blocks = (50, 5, 0)  # ten more of this request
    small_blocks = (100, 20, 0)  # five
    assert most_headroom(candidates(small_blocks, large_blocks), RNG) == 1


def test_equal_headroom_goes_to_the_replica_with_fewer_requests():
    busy, idle = (50, 5, 3), (50, 5, 1)
    assert most_headroom(candidates(busy, idle), RNG) == 1


def test_short_requests_go_to_the_less_loaded_of_two():
    roomy_but_busy, idle = (90, 2, 9), (20, 2, 1)
    assert least_loaded_of_two(candidates(roomy_but_busy, idle), RNG) == 1


def test_short_requests_between_two_reports_spread_over_many_replicas():
    equal = candidates(*[(50, 2, 0)] * 20)
    assert len({least_loaded_of_two(equal, RNG) for _ in range(200)}) > 10


def test_every_policy_takes_a_single_candidate():
    assert all(policy(candidates((5, 5, 3)), RNG) == 0 for policy in POLICIES.values())


def test_a_cached_prefix_decides_between_replicas_with_about_as_much_room():
    rows = ((100, 5, 0), (95, 5, 3))
    assert most_headroom(candidates(*rows, affinity=[0, 2]), RNG) == 1
    assert most_headroom(candidates(*rows, affinity=[1, 2]), RNG) == 1


def test_a_cached_prefix_never_overrides_headroom():
    assert most_headroom(candidates((100, 5, 0), (60, 5, 0), affinity=[0, 7]), RNG) == 0
    busy = [(50, 2, 4), (50, 2, 4), (50, 2, 9)]
    assert all(least_loaded_of_two(candidates(*busy, affinity=[0, 0, 7]), RNG) < 2 for _ in range(50))


def test_short_requests_find_their_prefix_among_many_equally_loaded_replicas():
    rows = [(50, 2, 4)] * 50
    affinity = [0] * 49 + [3]
    assert {least_loaded_of_two(candidates(*rows, affinity=affinity), RNG) for _ in range(50)} == {49}


def test_between_equals_the_replica_on_the_same_node_is_taken():
    rows = ((50, 5, 2), (50, 5, 2), (50, 5, 2))
    for policy in (most_headroom, least_loaded_of_two):
        assert policy(candidates(*rows[:2], local=[False, True]), RNG) == 1
