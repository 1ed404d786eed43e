"""Orders of one step, carried out together, against the same orders one after the other."""

import pytest
import torch

from triattention.config import CompressionConfig, Selection
from triattention.kernels import PagedCache
from triattention.policies import Policy
from triattention.vllm.compactor import Compactor, independent
from triattention.vllm.orders import CompactionOrder

BLOCK = 16


class FirstNumber(Policy):
    """A score that differs from key to key."""

    def score(self, keys: torch.Tensor, position: int) -> torch.Tensor:
        return keys[..., 0].float()


def order(name: str, blocks: list[int], tokens: int, dead: int = 1, protected: tuple[int, ...] = ()) -> CompactionOrder:
    return CompactionOrder(name, 0, tokens, 0, dead, tuple(blocks), protected)


def caches(memory: torch.Tensor) -> tuple[PagedCache, PagedCache]:
    logical = memory.permute(0, 1, 3, 2, 4)
    return PagedCache.plain([layer[..., :64] for layer in logical]), PagedCache.plain(
        [layer[..., 64:] for layer in logical]
    )


# Block 3 dies for the first request and is from then on the second's alone, to write into.
SHARING = [order("a", [3, 4, 5], 40), order("b", [2, 3, 7], 45), order("c", [8, 9, 10, 11], 64, 2, protected=(2,))]


@pytest.mark.parametrize("selection", ["per_head", "per_layer_per_head"])
@pytest.mark.parametrize("segments", [1, 4])
def test_orders_of_a_step_do_what_they_do_one_after_the_other(selection: Selection, segments: int) -> None:
    config = CompressionConfig(budget=32, window=4, policy="random", selection=selection, segments=segments)
    before = torch.randn((3, 15, BLOCK, 2, 128), generator=torch.Generator().manual_seed(4))
    results = []
    for steps in ([SHARING], [[order] for order in SHARING]):
        memory = before.clone()
        compactor = Compactor(config, *caches(memory), FirstNumber())
        for step in steps:
            compactor.carry_out(step)
        results.append(memory)
    assert torch.equal(*results)
    changed = (results[0] != before).any(dim=(0, 2, 3, 4))
    written = set(changed.nonzero().flatten().tolist())
    assert written <= {4, 5, 3, 7, 11}, "wrote into a dying or a protected block"
    assert len(written) >= 4


class Infinite(Policy):
    """Every token is worth keeping."""

    def score(self, keys: torch.Tensor, position: int) -> torch.Tensor:
        return torch.full(keys.shape[:3], torch.inf)


@pytest.mark.parametrize("selection", ["per_head", "per_layer_per_head"])
@pytest.mark.parametrize("segments", [1, 4])
def test_a_shared_block_is_not_written_whatever_a_policy_says(selection: Selection, segments: int) -> None:
    config = CompressionConfig(budget=32, window=4, policy="random", selection=selection, segments=segments)
    before = torch.randn((3, 15, BLOCK, 2, 128))
    memory = before.clone()
    Compactor(config, *caches(memory), Infinite()).carry_out([order("a", [8, 9, 10, 11], 64, 2, protected=(2,))])
    changed = (memory != before).any(dim=(0, 2, 3, 4))
    assert set(changed.nonzero().flatten().tolist()) == {11}


def test_an_order_waits_for_one_that_reads_what_it_writes_into() -> None:
    a, b, c = SHARING
    assert list(independent(SHARING)) == [[a], [b, c]]
    assert list(independent([b, a, c])) == [[b, a, c]]
    assert list(independent([])) == []


@pytest.mark.parametrize("segments", [1, 4])
def test_a_warm_up_writes_into_the_null_block_alone_and_leaves_nothing_behind(segments: int) -> None:
    config = CompressionConfig(budget=40, interval=24, window=4, policy="random", segments=segments)
    before = torch.randn((3, 5, BLOCK, 2, 128))
    memory = before.clone()
    compactor = Compactor(config, *caches(memory), FirstNumber())
    compactor.warm_up()
    assert torch.equal(memory[:, 1:], before[:, 1:])
    assert not torch.equal(memory[:, 0], before[:, 0]), "no survivor moved, so not every kernel was launched"
    assert compactor.quota is None or not compactor.quota._live
