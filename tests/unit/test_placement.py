"""Which of the replicas that fit."""

import random

from deploy.placement import POLICIES, Candidate, least_loaded_of_two, most_headroom

RNG = random.Random(0)


def test_long_requests_go_to_the_replica_with_the_most_headroom():
    near_full = Candidate("a", headroom_blocks=20, need_blocks=18, requests=0)
    roomy = Candidate("b", headroom_blocks=90, need_blocks=18, requests=9)
    assert most_headroom([near_full, roomy], RNG) == roomy


def test_headroom_counts_in_requests_where_block_sizes_differ():
    large_blocks = Candidate("a", headroom_blocks=50, need_blocks=5, requests=0)  # ten more of this request
    small_blocks = Candidate("b", headroom_blocks=100, need_blocks=20, requests=0)  # five
    assert most_headroom([small_blocks, large_blocks], RNG) == large_blocks


def test_equal_headroom_goes_to_the_replica_with_fewer_requests():
    busy = Candidate("b", 50, 5, requests=3)
    idle = Candidate("a", 50, 5, requests=1)
    assert most_headroom([busy, idle], RNG) == idle


def test_short_requests_go_to_the_less_loaded_of_two():
    roomy_but_busy = Candidate("a", 90, 2, requests=9)
    idle = Candidate("b", 20, 2, requests=1)
    assert least_loaded_of_two([roomy_but_busy, idle], RNG) == idle


def test_short_requests_between_two_reports_spread_over_many_replicas():
    candidates = [Candidate(str(i), 50, 2, requests=0) for i in range(20)]
    chosen = {least_loaded_of_two(candidates, RNG).replica for _ in range(200)}
    assert len(chosen) > 10


def test_every_policy_takes_a_single_candidate():
    only = Candidate("a", 5, 5, requests=3)
    assert all(policy([only], RNG) == only for policy in POLICIES.values())
