"""The kernels' torch path against fp64, `select` and `hole_fills`, and plain Python."""

from collections.abc import Callable, Iterator

import pytest
import torch

from tests.unit.hole_fills import hole_fills
from tests.unit.kernel_cases import Case, make_case, poisoned_outputs, worst_score_error
from tests.unit.tiny_models import random_statistics, yarn
from triattention import kernels
from triattention.kernels import HoleFills, LiveRegion, LiveRegions, PagedCache
from triattention.scoring import Scorer
from triattention.selection import select

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CACHES = ((torch.float32, "HND"), (torch.bfloat16, "NHD"), (torch.float16, "NHD"), (torch.float8_e4m3fn, "HND"))


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    with poisoned_outputs():
        yield


@pytest.mark.parametrize("group", [1, 2, 4, 8])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_equal_fp64(dtype: torch.dtype, head_dim: int, group: int) -> None:
    case = make_case(dtype, head_dim, group, tokens=(1, 75))
    assert worst_score_error(case, kernels.score(case.keys, case.weights, case.regions)) < 1e-4


@pytest.mark.parametrize(("rotary_dim", "interleaved"), [(128, True), (64, False), (64, True), (52, False)], ids=str)
def test_scores_equal_fp64_for_partial_and_interleaved_rotary(rotary_dim: int, interleaved: bool) -> None:
    case = make_case(rotary_dim=rotary_dim, interleaved=interleaved)
    assert worst_score_error(case, kernels.score(case.keys, case.weights, case.regions)) < 1e-4


def test_scores_do_not_depend_on_how_numbers_lie_within_a_block() -> None:
    case = make_case(block_size=32)
    scores = kernels.score(case.keys, case.weights, case.regions)
    for permuted in (_transposed, _tiled):
        keys = PagedCache(tuple(permuted(layer) for layer in case.keys.layers))
        torch.testing.assert_close(kernels.score(keys, case.weights, case.regions), scores, rtol=0, atol=1e-5)


def _transposed(layer: torch.Tensor) -> torch.Tensor:
    """As vLLM's CPU backend stores keys in its `vec` kernels: [head_dim, block_size]."""
    return layer.permute(0, 1, 4, 5, 2, 3).contiguous().permute(0, 1, 4, 5, 2, 3)


def _tiled(layer: torch.Tensor) -> torch.Tensor:
    """As in its `amx` kernels: [block_size / 16, head_dim / 2, 16, 2]."""
    blocks, heads, size, _, dim, _ = layer.shape
    tiles = layer.reshape(blocks, heads, size // 16, 16, dim // 2, 2)
    return tiles.permute(0, 1, 2, 4, 3, 5).contiguous().permute(0, 1, 2, 4, 3, 5)


@pytest.mark.parametrize("shared", [True, False], ids=["per_head", "per_layer_per_head"])
def test_layers_in_memories_of_their_own_give_the_same_as_layers_in_one(shared: bool) -> None:
    one = make_case(tokens=(48, 75), dead_slots=(16, 32), layers=3)
    assert one.keys.all_layers is not None
    keys, values = (PagedCache(tuple(layer.clone() for layer in cache.layers)) for cache in (one.keys, one.values))
    assert keys.all_layers is None
    scores = kernels.score(one.keys, one.weights, one.regions)
    torch.testing.assert_close(kernels.score(keys, one.weights, one.regions), scores, rtol=0, atol=1e-5)
    fills = kernels.plan(scores, one.regions, 8, shared)
    assert (fills.source >= 0).any()
    for cache in (one, Case(one.memory, keys, values, one.weights, one.regions)):
        kernels.compact(cache.keys, cache.values, cache.regions, fills)
    for layer in range(3):
        assert torch.equal(keys.layers[layer].view(torch.int16), one.keys.layers[layer].view(torch.int16))
        assert torch.equal(values.layers[layer].view(torch.int16), one.values.layers[layer].view(torch.int16))


def test_scores_are_those_of_the_scorer() -> None:
    statistics = random_statistics(yarn(head_dim=64))
    case = make_case(layers=3, head_dim=64, group=2, tokens=(75,))
    scorer = Scorer(statistics, range(3), range(2))
    weights = scorer.query_weights(torch.device("cpu"))
    [region] = case.regions.regions
    expected = scorer.score(case.keys.gather(torch.tensor(region.block_ids), 75), region.position)
    torch.testing.assert_close(kernels.score(case.keys, weights, case.regions), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("shared", [True, False], ids=["per_head", "per_layer_per_head"])
def test_plan_keeps_what_selection_keeps(shared: bool) -> None:
    check_plan(kernels.plan, shared)


def check_plan(plan: Callable[[torch.Tensor, LiveRegions, int, bool], HoleFills], shared: bool) -> None:
    """Scores with ties, infinities, NaN and both zeros; requests that lose one token, most, and none."""
    tokens, dead, window = (100, 21, 300, 17), (16, 1, 256, 0), 8
    regions = LiveRegions([LiveRegion(range(20), n, d, n) for n, d in zip(tokens, dead, strict=True)], 16, "cpu")
    draw = torch.Generator().manual_seed(1)
    scores = torch.randn(2, 2, sum(tokens), generator=draw)
    scores[0] = (2 * scores[0]).round() / 2
    scores[1, 1, ::5] = torch.nan
    scores[1, 0, ::7] = torch.inf
    scores[1, 0, ::11] = -torch.inf
    scores[1, 1, 1::7] = -0.0
    scores[1, 1, 2::7] = 0.0
    fills = plan(scores, regions, window, shared)
    assert fills.source.shape == fills.target.shape == (1 if shared else 2, 2, sum(dead))
    for request, region in enumerate(regions.regions):
        own = scores[..., regions.token_slice(request)]
        kept = select(own, region.tokens - region.dead_slots, window, "per_head" if shared else "per_layer_per_head")
        moves = hole_fills(kept, region.dead_slots)
        part = regions.fill_slice(request)
        for layer in range(fills.source.shape[0]):
            for head in range(2):
                mine = (moves.layer == layer) & (moves.head == head)
                none = [-1] * (region.dead_slots - int(mine.sum()))
                assert fills.source[layer, head, part].tolist() == moves.source[mine].tolist() + none
                assert fills.target[layer, head, part].tolist() == moves.target[mine].tolist() + none


@pytest.mark.parametrize(("dtype", "layout"), CACHES, ids=str)
@pytest.mark.parametrize("holes", ["some", "none", "in one block"])
@pytest.mark.parametrize("shared", [True, False], ids=["per_head", "per_layer_per_head"])
def test_compaction_fills_holes_bit_for_bit_and_writes_nothing_else(
    dtype: torch.dtype, layout: str, holes: str, shared: bool
) -> None:
    case = make_case(dtype, 80, layout=layout, tokens=(48, 75, 33), dead_slots=(16, 32, 16))
    before = Case(case.memory.clone(), case.keys, case.values, case.weights, case.regions)
    fills = fills_of(case, holes, shared)
    kernels.compact(case.keys, case.values, case.regions, fills)
    check_compaction(before, fills, case.memory, layout)


def fills_of(case: Case, holes: str, shared: bool) -> HoleFills:
    """What planning gives for random scores; for survivors of live blocks only; and for the last block's eviction."""
    scores = torch.randn(2, 2, case.regions.tokens, generator=torch.Generator().manual_seed(2))
    for request, region in enumerate(case.regions.regions):
        own = scores[..., case.regions.token_slice(request)]
        if holes == "none":
            own[..., : region.dead_slots] = -9
        elif holes == "in one block":
            own[..., region.tokens - min(region.dead_slots, 1 + (region.tokens - 1) % 16) :] = -9
    fills = kernels.plan(scores, case.regions, 0, shared)
    if holes == "none":
        assert (fills.source == -1).all()
    elif holes == "in one block":
        last = torch.tensor([(r.tokens - 1) // 16 for r in case.regions.regions]).repeat_interleave(
            torch.tensor([r.dead_slots for r in case.regions.regions])
        )
        filled = fills.target >= 0
        assert filled.any(-1).all()
        assert (fills.target // 16 == last)[filled].float().mean() > 0.5
    else:
        assert (fills.source >= 0).any()
    return fills


def check_compaction(before: Case, fills: HoleFills, memory: torch.Tensor, layout: str) -> None:
    """`memory` is `before.memory` with the fills carried out one number row at a time, and no bit else changed."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[memory.element_size()]
    order = (0, 1, 3, 2, 4) if layout == "NHD" else (0, 1, 2, 3, 4)
    expected = before.memory.view(integers).clone()
    cache = expected.permute(order)
    for request, region in enumerate(before.regions.regions):
        part = before.regions.fill_slice(request)
        for layer in range(cache.shape[0]):
            row = layer if fills.source.shape[0] > 1 else 0
            for head in range(cache.shape[2]):
                pairs = zip(fills.source[row, head, part].tolist(), fills.target[row, head, part].tolist(), strict=True)
                for source, target in pairs:
                    if source >= 0:
                        survivor = cache[layer, region.block_ids[source // 16], head, source % 16]
                        cache[layer, region.block_ids[target // 16], head, target % 16] = survivor
    assert torch.equal(memory.view(integers), expected)


def test_compaction_of_tiled_layouts_moves_whole_tokens() -> None:
    case = make_case(block_size=32, tokens=(96,), dead_slots=(32,))
    fills = kernels.plan(torch.randn(2, 2, 96, generator=torch.Generator().manual_seed(3)), case.regions, 0, False)
    keys = PagedCache(tuple(_tiled(layer) for layer in case.keys.layers))
    values = PagedCache(tuple(_transposed(layer) for layer in case.values.layers))
    kernels.compact(keys, values, case.regions, fills)
    kernels.compact(case.keys, case.values, case.regions, fills)
    ids = torch.tensor(case.regions.regions[0].block_ids)
    assert torch.equal(keys.gather(ids, 96), case.keys.gather(ids, 96))
    assert torch.equal(values.gather(ids, 96), case.values.gather(ids, 96))


def test_layers_that_lie_differently_are_refused() -> None:
    rows = torch.zeros(4, 2, 16, 64)
    with pytest.raises(AssertionError, match="differ"):
        PagedCache.plain([rows, rows.transpose(1, 2).contiguous().transpose(1, 2)])


def squeeze(table: torch.Tensor, lengths: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    squeezed, live = torch.empty_like(table), torch.empty_like(lengths)
    kernels.squeeze(table, lengths, block_size, squeezed, live)
    return squeezed, live


def test_squeezing_drops_only_null_blocks_inside_the_used_part_of_a_row() -> None:
    check_squeeze(squeeze)


def test_squeezing_leaves_the_rows_of_dummy_steps_as_they_are() -> None:
    check_squeeze_of_dummies(squeeze)


Squeeze = Callable[[torch.Tensor, torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]


def check_squeeze(squeeze: Squeeze) -> None:
    """Rows with and without nulls, padded rows, tails of zeros and of stale ids: against plain lists."""
    rows = [
        ([5, 0, 0, 7, 8], 18),
        ([1, 2, 3], 11),
        ([0, 0, 4], 9),
        ([9], 1),
        ([], 0),
        (list(range(1, 41)), 160),
        ([*range(50, 60), *[0] * 20, *range(60, 70)], 157),
    ]
    for tail in (0, 77):
        table = torch.full((len(rows), 44), tail, dtype=torch.int32)
        for row, (ids, _) in enumerate(rows):
            table[row, : len(ids)] = torch.tensor(ids, dtype=torch.int32)
        lengths = torch.tensor([length for _, length in rows], dtype=torch.int32)
        squeezed, live = squeeze(table, lengths, 4)
        assert squeezed.dtype == live.dtype == torch.int32
        for row, (ids, length) in enumerate(rows):
            kept = [block for block in ids if block]
            assert squeezed[row, : len(kept)].tolist() == kept
            assert live[row] == length - 4 * ids.count(0)


def check_squeeze_of_dummies(squeeze: Squeeze) -> None:
    """vLLM warms up and captures CUDA graphs with tables of null blocks alone; attention takes no negative lengths."""
    lengths = torch.tensor([1, 4, 9, 0, 160], dtype=torch.int32)
    squeezed, live = squeeze(torch.zeros((5, 44), dtype=torch.int32), lengths, 4)
    assert live.tolist() == lengths.tolist()
    for row, length in enumerate(lengths.tolist()):
        assert not squeezed[row, : -(-length // 4)].any()
