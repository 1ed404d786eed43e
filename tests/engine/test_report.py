"""What an engine reports of its pinned prompts and first compactions, against what its own tables hold."""

import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from vllm import LLM
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.kv_cache_interface import ChunkedLocalAttentionSpec, FullAttentionSpec, SlidingWindowSpec
from vllm.v1.metrics.stats import SchedulerStats

from tests.engine.conftest import BLOCK, VOCABULARY, EngineFactory
from tests.engine.hand_driven import HandDriven
from tests.engine.test_exactness import generate, scheduler_of
from tests.engine.test_living_with_vllm import add, step_until
from triattention.config import CompressionConfig
from triattention.report import EngineReport
from triattention.vllm import engine_arguments
from triattention.vllm.support import sends_reports


def test_pinned_prompts_and_first_compactions_are_reported(
    engine: EngineFactory, statistics: Path, prompts: list[list[int]]
) -> None:
    llm = engine(CompressionConfig(budget=128, interval=96, window=16, statistics=statistics))
    scheduler = scheduler_of(llm)

    def report() -> EngineReport:
        return EngineReport.from_dict(scheduler.report(SchedulerStats()).to_dict())

    before, began = report(), time.time()
    for number, prompt in enumerate(prompts[1:]):  # of 37, 70 and 101 tokens
        add(llm, f"report-{number}", prompt, 700 if number else 100)
    step_until(llm, "report-1", 60)
    young = report()
    assert young.pinned_blocks == sum(-(-len(prompt) // BLOCK) for prompt in prompts[1:])
    assert 40 < young.output_tokens[next(r for r in young.held_blocks if "report-1" in r)] <= 61
    assert young.output_tokens.keys() == young.held_blocks.keys()
    assert young.first_compaction_counts == before.first_compaction_counts
    step_until(llm, "report-1", 600)
    old = report()
    assert old.pinned_blocks == sum(-(-len(prompt) // BLOCK) for prompt in prompts[2:])
    assert old.pinned_blocks < sum(old.held_blocks.values()) < old.uncompressed_blocks
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
    after = report()
    # Two requests grew past budget + interval, each of them several times.
    assert after.compactions - before.compactions > 4
    assert sum(after.first_compaction_counts) - sum(before.first_compaction_counts) == 2
    assert 0 < after.first_compaction_seconds - before.first_compaction_seconds < 2 * (time.time() - began)
    assert after.pinned_blocks == 0


def test_nothing_is_collected_for_reports_that_nobody_gets(tiny_model: Path) -> None:
    """`LLM` keeps no statistics by default, and the report travels with these."""
    arguments = engine_arguments(None)
    sizes = {"max_model_len": 256, "num_gpu_blocks_override": 20, "kv_cache_memory_bytes": 1 << 28}
    llm = LLM(str(tiny_model), dtype="float32", enforce_eager=True, skip_tokenizer_init=True, **sizes, **arguments)
    assert sends_reports(llm.llm_engine.vllm_config)
    generate(llm, [[1, 2, 3]], 5)
    assert scheduler_of(llm).ended == {}
    llm.llm_engine.engine_core.shutdown()


class UnreadTable(list[KVCacheBlock]):
    def __iter__(self) -> Iterator[KVCacheBlock]:
        raise AssertionError("the whole table was looked at")


def test_blocks_are_counted_without_a_look_at_whole_tables(tiny_model: Path) -> None:
    """A sliding layer's table is as long as the text, and all but its end is null."""
    shape = {"block_size": BLOCK, "num_kv_heads": 2, "head_size": 32, "dtype": torch.float32}
    others = [
        FullAttentionSpec(**shape),
        SlidingWindowSpec(**shape, sliding_window=100),
        ChunkedLocalAttentionSpec(**shape, attention_chunk_size=96),
    ]
    config = CompressionConfig(budget=96, interval=64, window=16, policy="key_norm")
    driven = HandDriven(tiny_model, config, others, blocks=300, in_flight=2, max_num_batched_tokens=256)
    scheduler, draw = driven.scheduler, random.Random(1)
    text = [draw.randrange(VOCABULARY) for _ in range(1500)]
    for number in range(12):  # prefixes of one text, so that most begin with hits
        driven.add(f"r{number}", text[: draw.randrange(1, len(text))], draw.randrange(1, 200))
    managers = scheduler.kv_cache_manager.coordinator.single_type_managers
    shared = False
    while scheduler.requests:
        driven.step()
        shared |= any(block.ref_cnt > 1 for table in managers[1].req_to_blocks.values() for block in table)
        counted = {
            name: sum(not block.is_null for manager in managers for block in manager.req_to_blocks.get(name, ()))
            for name in scheduler.held_blocks()
        }
        for manager in managers:
            for name, table in manager.req_to_blocks.items():
                manager.req_to_blocks[name] = UnreadTable(table)
        assert scheduler.held_blocks() == counted
        for manager in managers:
            for name, table in manager.req_to_blocks.items():
                manager.req_to_blocks[name] = table[:]
    assert shared


@pytest.fixture
def connector() -> Iterator[KVTransferConfig]:
    yield KVTransferConfig(kv_connector="ExampleConnector", kv_role="kv_both")
    ensure_kv_transfer_shutdown()  # the worker has begun it before the scheduler refuses


def test_reports_do_not_share_their_place_with_the_statistics_of_a_kv_connector(
    tiny_model: Path, connector: KVTransferConfig
) -> None:
    with pytest.raises(ValueError, match=r"kv_transfer_config names ExampleConnector, but .* unset kv_transfer_config"):
        LLM(
            str(tiny_model),
            max_model_len=256,
            num_gpu_blocks_override=20,
            kv_cache_memory_bytes=1 << 28,
            enforce_eager=True,
            skip_tokenizer_init=True,
            disable_log_stats=False,
            kv_transfer_config=connector,
            **engine_arguments(None),
        )
