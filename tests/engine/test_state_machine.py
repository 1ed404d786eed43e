"""The manager's invariants over random histories, and mutants that break each of them and are caught by its name."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from vllm.v1.core.block_pool import BlockPool

from tests.engine import state_machine
from tests.engine.state_machine import Engine
from triattention.compaction import first_live_block
from triattention.vllm.kv_manager import CompactedAttentionManager
from triattention.vllm.orders import CompactionOrder
from triattention.vllm.pool import Pool

CHECKS = [HealthCheck.too_slow, HealthCheck.filter_too_much]
HISTORIES = settings(max_examples=20, stateful_step_count=50, suppress_health_check=CHECKS)


def engine(lag: int, **changes: Any) -> type[Engine]:
    return type("Engine", (Engine,), {"lag": lag, "config": Engine.config.model_copy(update=changes)})


VARIANTS = {
    f"{scheduling}, prompt {prompt}, {growth}": engine(lag, prompt=prompt, reserve_growth=growth == "growth reserved")
    for lag, scheduling in enumerate(("sync", "async"))
    for prompt in ("pin", "compress")
    for growth in ("tight pool", "growth reserved")
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_invariants_hold_over_random_histories(variant: str) -> None:
    run_state_machine_as_test(VARIANTS[variant], settings=HISTORIES)


def test_the_histories_were_ten_thousand_steps_and_more() -> None:
    assert Engine.steps_taken >= 10_000


def hashes_are_kept(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BlockPool, "_maybe_evict_cached_block", lambda _self, block: block.block_hash is not None)


def shared_blocks_are_not_protected(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        "triattention.vllm.kv_manager.CompactionOrder",
        lambda **fields: CompactionOrder(**fields | {"protected_blocks": ()}),
    )


def hashes_are_published_after_a_compaction(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Pool, "is_compacted", lambda *_: False)


def dead_blocks_are_not_freed(patch: pytest.MonkeyPatch) -> None:
    def forget(self: CompactedAttentionManager, request_id: str, first: int, last: int) -> None:
        self.req_to_blocks[request_id][first:last] = [self._null_block] * (last - first)

    patch.setattr(CompactedAttentionManager, "_remove_blocks_in_range", forget)


def one_more_block_dies_than_the_order_says(patch: pytest.MonkeyPatch) -> None:
    remove = CompactedAttentionManager._remove_blocks_in_range

    def too_many(self: CompactedAttentionManager, request_id: str, first: int, last: int) -> None:
        remove(self, request_id, first, last + 1)

    patch.setattr(CompactedAttentionManager, "_remove_blocks_in_range", too_many)


def compactions_come_late(patch: pytest.MonkeyPatch) -> None:
    def late(processed: int, first: int, size: int, config: Any) -> int | None:
        return first_live_block(processed - 4 * size, first, size, config)

    patch.setattr("triattention.vllm.kv_manager.first_live_block", late)


def growth_of_running_requests_is_forgotten(patch: pytest.MonkeyPatch) -> None:
    allocate = CompactedAttentionManager.get_num_blocks_to_allocate

    def forgetful(self: CompactedAttentionManager, *arguments: Any, **keywords: Any) -> int:
        config, self.config = self.config, self.config.model_copy(update={"reserve_growth": False})
        try:
            return allocate(self, *arguments, **keywords)
        finally:
            self.config = config

    patch.setattr(CompactedAttentionManager, "get_num_blocks_to_allocate", forgetful)


def hits_are_not_limited(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(CompactedAttentionManager, "hit_limit", lambda _self, request: request.num_tokens)


def orders_are_carried_out_at_once_whatever_they_share(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(state_machine, "independent", lambda orders: [list(orders)])


MUTANTS: list[tuple[Callable[[pytest.MonkeyPatch], None], str, str]] = [
    (hashes_are_kept, "async, prompt pin, tight pool", "that later requests may hit|not what its hash says"),
    (shared_blocks_are_not_protected, "async, prompt pin, tight pool", "wrote into a block that another request reads"),
    (hashes_are_published_after_a_compaction, "async, prompt pin, tight pool", "an approximate block is published"),
    (dead_blocks_are_not_freed, "async, prompt pin, tight pool", "blocks are lost or held twice"),
    (one_more_block_dies_than_the_order_says, "async, prompt pin, tight pool", "what is read back is not what is live"),
    (compactions_come_late, "async, prompt compress, tight pool", "live blocks exceed the bound"),
    (hits_are_not_limited, "sync, prompt pin, tight pool", "live blocks exceed the bound"),
    (growth_of_running_requests_is_forgotten, "async, prompt pin, growth reserved", "cannot grow although"),
    (
        orders_are_carried_out_at_once_whatever_they_share,
        "async, prompt compress, tight pool",
        "token is seen twice|not what is live|another request's",
    ),
]


@pytest.mark.parametrize(("mutant", "variant", "name"), MUTANTS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_mutant_is_caught_by_the_name_of_what_it_breaks(
    monkeypatch: pytest.MonkeyPatch, mutant: Callable[[pytest.MonkeyPatch], None], variant: str, name: str
) -> None:
    mutant(monkeypatch)
    searching = settings(
        HISTORIES,
        max_examples=300,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        report_multiple_bugs=False,
    )
    with pytest.raises(AssertionError, match=name):
        run_state_machine_as_test(VARIANTS[variant], settings=searching)
