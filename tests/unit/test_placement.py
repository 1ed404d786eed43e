"""Which of the replicas that fit."""

import random

import numpy as np

from deploy.placement import POLICIES, Candidates, least_loaded_of_two, most_headroom

RNG = random.Random(0)


def candidates(*rows):
    """Each (headroom, need, requests)."""
    return Candidates(*(np.array(column) for column in zip(*rows, strict=True)))


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
