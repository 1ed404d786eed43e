"""What a request needs on a replica, and what is refused for good."""

import pytest

from deploy.demand import blocks_needed, refuse_if_never
from deploy.messages import Demand
from deploy.replica_table import ReplicaKind
from tests.unit.reports import BLOCK, compression, report
from triattention.bounds import blocks_bound


def kind(**values):
    return ReplicaKind.of(report(**values))


def test_without_compression_the_need_is_prompt_and_output():
    assert blocks_needed(Demand("r", 100, 1000), kind()) == 32  # ceil(1000 / 32), not ceil(100 / 32)


def test_with_compression_the_need_is_the_bound_and_does_not_grow_with_the_output():
    compressed = kind(compression=compression())
    bound = blocks_bound(100, 2000, BLOCK, compression(), in_flight_tokens=2)
    assert bound < 20
    assert blocks_needed(Demand("r", 100, 2000), compressed) == bound
    assert blocks_needed(Demand("r", 100, 8000), compressed) == bound


def test_every_sequence_of_a_request_counts():
    assert blocks_needed(Demand("r", 100, 1000, sequences=3), kind()) == 96


def test_each_replica_is_judged_by_its_own_block_size():
    assert blocks_needed(Demand("r", 100, 1000), kind(block_size=128)) == 8


def test_over_max_model_len_is_refused_with_both_numbers():
    refusal = refuse_if_never(Demand("r", 200, 9000), [(kind(), 1000)])
    assert refusal is not None
    assert (refusal.status, refusal.reason) == (400, "over_max_model_len")
    assert "200 prompt and 8800 output tokens" in refusal.message
    assert "max_model_len is 8192" in refusal.message


def test_over_the_pool_is_refused_with_the_pool():
    refusal = refuse_if_never(Demand("r", 200, 4000), [(kind(), 96), (kind(max_model_len=9000), 86)])
    assert refusal is not None
    assert (refusal.status, refusal.reason) == (400, "over_kv_pool")
    assert "125 KV blocks" in refusal.message
    assert "96 to give" in refusal.message  # the one that comes closer


@pytest.mark.parametrize("known", [[], [(kind(), 100), (kind(block_size=64), 130)]])
def test_what_fits_one_replica_or_is_unknown_is_not_refused(known):
    assert refuse_if_never(Demand("r", 200, 4000), known) is None


def test_compression_admits_what_the_whole_length_would_not():
    request = Demand("r", 200, 8000)
    assert refuse_if_never(request, [(kind(), 100)]) is not None
    assert refuse_if_never(request, [(kind(compression=compression()), 100)]) is None
