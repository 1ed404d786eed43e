"""The Triton kernels against fp64 and plain Python, under Triton's interpreter."""

from collections.abc import Iterator

import pytest
import torch

from tests.unit import interpreted
from tests.unit.interpreted import Interpret, interpreter
from tests.unit.kernel_cases import make_case, worst_score_error
from tests.unit.test_kernels import (
    CACHES,
    DTYPES,
    check_compaction,
    check_plan,
    check_squeeze,
    check_squeeze_of_dummies,
    fills_of,
)

GROUPS = (1, 2, 4, 8)
HEAD_DIMS = (64, 80, 96, 128, 256)
TOLERANCE = 2e-4
"""In deviations of a head's scores. The interpreter cuts bf16 off where a GPU rounds them."""


@pytest.fixture(scope="module")
def interpret() -> Iterator[Interpret]:
    with interpreter() as run:
        yield run


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_equal_fp64_for_every_dtype_and_head_dim(
    interpret: Interpret, dtype: torch.dtype, head_dim: int
) -> None:
    group = GROUPS[(DTYPES.index(dtype) + HEAD_DIMS.index(head_dim)) % len(GROUPS)]
    case = make_case(dtype, head_dim, group, layers=1, tokens=(1, 75))
    assert worst_score_error(case, interpret(interpreted.score, case)) < TOLERANCE


@pytest.mark.parametrize("group", GROUPS)
def test_scores_equal_fp64_for_every_query_group(interpret: Interpret, group: int) -> None:
    case = make_case(group=group, head_dim=64, tokens=(40,))
    assert worst_score_error(case, interpret(interpreted.score, case)) < TOLERANCE


@pytest.mark.parametrize(("rotary_dim", "interleaved"), [(128, True), (64, False), (64, True), (52, False)], ids=str)
def test_scores_equal_fp64_for_partial_and_interleaved_rotary(
    interpret: Interpret, rotary_dim: int, interleaved: bool
) -> None:
    case = make_case(rotary_dim=rotary_dim, interleaved=interleaved, layers=1)
    assert worst_score_error(case, interpret(interpreted.score, case)) < TOLERANCE


@pytest.mark.parametrize("layout", ["NHD", "HND", "blocks first"])
def test_scores_do_not_depend_on_how_vllm_lays_the_cache_out(interpret: Interpret, layout: str) -> None:
    case = make_case(layout=layout, head_dim=64)
    assert worst_score_error(case, interpret(interpreted.score, case)) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_scores_of_a_quantised_cache_equal_fp64(interpret: Interpret, dtype: torch.dtype) -> None:
    case = make_case(dtype, head_dim=64)
    assert worst_score_error(case, interpret(interpreted.score, case)) < TOLERANCE


def test_very_different_lengths_in_one_launch_and_rows_longer_than_a_program_holds(interpret: Interpret) -> None:
    case = make_case(head_dim=64, group=2, tokens=(1, 333, 17, 2))
    assert worst_score_error(case, interpret(interpreted.score, case)) < TOLERANCE
    assert worst_score_error(case, interpret(interpreted.score_in_small_pieces, case)) < TOLERANCE


def test_equal_keys_score_zero(interpret: Interpret) -> None:
    case = make_case(head_dim=64)
    for layer in case.keys.layers:
        layer.copy_(torch.ones(64).view(1, 1, 1, 1, 64, 1) / 3)
    assert not interpret(interpreted.score, case).any()


def test_each_number_of_each_live_key_is_read_exactly_once(interpret: Interpret) -> None:
    case = make_case(tokens=(1, 300, 40), kv_heads=2, layers=2, head_dim=64)
    reads = interpret(interpreted.key_reads, case)
    live = torch.zeros(case.memory.numel(), dtype=torch.int64)
    places = torch.arange(case.memory.numel()).view(case.memory.shape).permute(0, 1, 3, 2, 4)
    for region in case.regions.regions:
        for slot in range(region.tokens):
            key = places[:, region.block_ids[slot // 16], :, slot % 16, :64]
            live[key.flatten()] = 1
    assert torch.equal(reads.bincount(minlength=live.numel()), live)


@pytest.mark.parametrize("shared", [True, False], ids=["per_head", "per_layer_per_head"])
@pytest.mark.parametrize("at_once", [4096, 64], ids=["rows held whole", "rows in pieces"])
def test_plan_keeps_what_selection_keeps(interpret: Interpret, shared: bool, at_once: int) -> None:
    check_plan(lambda *arguments: interpret(interpreted.plan, *arguments, at_once), shared)


@pytest.mark.parametrize(("dtype", "layout"), CACHES, ids=str)
@pytest.mark.parametrize("holes", ["some", "none", "in one block"])
@pytest.mark.parametrize("shared", [True, False], ids=["per_head", "per_layer_per_head"])
def test_compaction_fills_holes_bit_for_bit_and_writes_nothing_else(
    interpret: Interpret, dtype: torch.dtype, layout: str, holes: str, shared: bool
) -> None:
    head_dim = 80 if layout == "NHD" else 128
    case = make_case(dtype, head_dim, layout=layout, tokens=(48, 75, 33), dead_slots=(16, 32, 16))
    fills = fills_of(case, holes, shared)
    check_compaction(case, fills, interpret(interpreted.compact, case, fills), layout)


@pytest.mark.parametrize("at_once", [1024, 16], ids=["rows held whole", "rows in pieces"])
def test_squeezing_drops_only_null_blocks_inside_the_used_part_of_a_row(interpret: Interpret, at_once: int) -> None:
    check_squeeze(lambda *arguments: interpret(interpreted.squeeze, *arguments, at_once))


def test_squeezing_leaves_the_rows_of_dummy_steps_as_they_are(interpret: Interpret) -> None:
    check_squeeze_of_dummies(lambda *arguments: interpret(interpreted.squeeze, *arguments, 16))
