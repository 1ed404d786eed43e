"""What a request needs on a replica, and what is refused for good."""

import pytest

from deploy.demand import blocks_needed, refuse_if_never
from deploy.messages import Demand
from tests.unit.reports import BLOCK, compression, report
from triattention.bounds import blocks_bound


def replica(name="a", **values):
    made = report(name, **values)
    return made.limits, made.engine


def test_without_compression_the_need_is_prompt_and_output():
    assert blocks_needed(Demand("r", 100, 1000), *replica()) == 32  # ceil(1000 / 32), not ceil(100 / 32)


def test_with_compression_the_need_is_the_bound_and_does_not_grow_with_the_output():
    limits = replica(compression=compression())
    bound = blocks_bound(100, 2000, BLOCK, compression(), in_flight_tokens=2)
    assert bound < 20
    assert blocks_needed(Demand("r", 100, 2000), *limits) == bound
    assert blocks_needed(Demand("r", 100, 8000), *limits) == bound


def test_every_sequence_of_a_request_counts():
    assert blocks_needed(Demand("r", 100, 1000, sequences=3), *replica()) == 96


def test_each_replica_is_judged_by_its_own_block_size():
    assert blocks_needed(Demand("r", 100, 1000), *replica(block_size=128)) == 8


def test_over_max_model_len_is_refused_with_both_numbers():
    refusal = refuse_if_never(Demand("r", 200, 9000), [replica(total=1000)], 0)
    assert refusal is not None
    assert (refusal.status, refusal.reason) == (400, "over_max_model_len")
    assert "200 prompt and 8800 output tokens" in refusal.message
    assert "max_model_len is 8192" in refusal.message


def test_over_the_pool_is_refused_with_the_pool():
    refusal = refuse_if_never(Demand("r", 200, 4000), [replica(total=100), replica("b", total=90)], 4)
    assert refusal is not None
    assert (refusal.status, refusal.reason) == (400, "over_kv_pool")
    assert "125 KV blocks" in refusal.message
    assert "96 to give" in refusal.message  # the larger pool, without its watermark


@pytest.mark.parametrize("known", [[], [replica(total=100), replica("b", total=130)]])
def test_what_fits_one_replica_or_is_unknown_is_not_refused(known):
    assert refuse_if_never(Demand("r", 200, 4000), known, 4) is None


def test_compression_admits_what_the_whole_length_would_not():
    request = Demand("r", 200, 8000)
    assert refuse_if_never(request, [replica(total=100)], 0) is not None
    assert refuse_if_never(request, [replica(total=100, compression=compression())], 0) is None
