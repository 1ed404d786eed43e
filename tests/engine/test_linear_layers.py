"""Hybrids whose linear layers save states for prefix caching (vLLM's Mamba cache mode "align"): their blocks are in the
bound, and nothing approximate is published of them.
"""

import random
from pathlib import Path

import pytest
import torch
from vllm.v1.kv_cache_interface import MambaSpec
from vllm.v1.request import RequestStatus

from tests.engine.conftest import BLOCK, VOCABULARY
from tests.engine.hand_driven import HandDriven
from triattention.config import CompressionConfig

CONFIG = CompressionConfig(budget=96, interval=64, window=16, policy="key_norm")


def states(block_size: int = BLOCK, checkpoints: int = 1) -> MambaSpec:
    """`checkpoints`: states that the kernel can save on its way through one chunk, as Mamba 2's can."""
    return MambaSpec(
        block_size=block_size, shapes=((2, 32),), dtypes=(torch.float32,), mamba_cache_mode="align",
        num_prefill_checkpoint_blocks=checkpoints, prefill_checkpoint_alignment=1 if checkpoints else None,
    )  # fmt: skip


def tokens(count: int, seed: int = 1) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(VOCABULARY) for _ in range(count)]


@pytest.mark.parametrize("in_flight", [1, 2], ids=["sync", "async"])
@pytest.mark.parametrize("checkpoints", [0, 1])
@pytest.mark.parametrize(("block_size", "hash_block"), [(BLOCK, BLOCK), (4 * BLOCK, BLOCK)], ids=["whole", "partial"])
@pytest.mark.parametrize(("prompt_tokens", "max_tokens"), [(1000, 10), (50, 5)])
def test_a_pool_as_large_as_its_bound_serves_a_request_and_its_repetition(
    tiny_model: Path,
    in_flight: int,
    checkpoints: int,
    block_size: int,
    hash_block: int,
    prompt_tokens: int,
    max_tokens: int,
) -> None:
    """`partial`: hits end inside the blocks of states, which are copied then."""
    others = [states(block_size, checkpoints)] * 2
    settings = {"in_flight": in_flight, "hash_block": hash_block, "max_num_batched_tokens": 256}
    roomy = HandDriven(tiny_model, CONFIG, others, blocks=200, **settings)
    bound = roomy.scheduler.pool.bound(roomy.add("measured", tokens(prompt_tokens), max_tokens))
    tight = HandDriven(tiny_model, CONFIG, others, blocks=bound + 1, **settings)
    for name in ("first", "again"):
        request = tight.add(name, tokens(prompt_tokens), max_tokens)
        tight.run(100)
        assert request.status is RequestStatus.FINISHED_LENGTH_CAPPED
    assert tight.scheduler.preemptions == 0


@pytest.mark.parametrize(("in_flight", "most"), [(1, 3), (2, 5)], ids=["sync", "async"])
def test_every_step_in_flight_may_hold_a_state_and_one_saved_on_its_way(
    tiny_model: Path, in_flight: int, most: int
) -> None:
    driven = HandDriven(tiny_model, CONFIG, [states()], blocks=200, in_flight=in_flight, max_num_batched_tokens=256)
    driven.add("long", tokens(1000), 10)
    linear = driven.scheduler.kv_cache_manager.coordinator.single_type_managers[1]
    held = []
    while driven.scheduler.requests:
        driven.step()
        held.append(sum(not block.is_null for block in linear.req_to_blocks["long"]))
    assert max(held) == most


@pytest.mark.parametrize("in_flight", [1, 2], ids=["sync", "async"])
@pytest.mark.parametrize("checkpoints", [0, 1])
@pytest.mark.parametrize("hash_block", [BLOCK, BLOCK // 2], ids=["whole", "partial"])
@pytest.mark.parametrize("prompt", ["pin", "compress"])
def test_nothing_is_published_of_a_request_that_was_compacted_until_it_starts_anew(
    tiny_model: Path, in_flight: int, checkpoints: int, hash_block: int, prompt: str
) -> None:
    driven = HandDriven(
        tiny_model,
        CONFIG.model_copy(update={"prompt": prompt}),
        [states(checkpoints=checkpoints)],
        blocks=200,
        in_flight=in_flight,
        hash_block=hash_block,
        max_num_batched_tokens=256,
    )
    request = driven.add("long", tokens(700 if prompt == "compress" else 100), 1000)
    full = driven.scheduler.compacted[0]
    for preempted in (False, True):
        if preempted:
            driven.scheduler.reset_prefix_cache(reset_running_requests=True)
            assert not driven.published()
        while "long" not in full.null_blocks:
            exact = driven.published()
            driven.step()
        assert len(exact) > 3
        while request.num_computed_tokens < 900:
            assert driven.published() <= exact
            driven.step()
