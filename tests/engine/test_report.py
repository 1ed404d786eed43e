"""What an engine reports of its pinned prompts and first compactions, against what its own tables hold."""

import time
from pathlib import Path

import pytest
from vllm import LLM
from vllm.config import KVTransferConfig
from vllm.v1.metrics.stats import SchedulerStats

from tests.engine.conftest import BLOCK, EngineFactory
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


def test_reports_do_not_share_their_place_with_the_statistics_of_a_kv_connector(tiny_model: Path) -> None:
    connector = KVTransferConfig(kv_connector="ExampleConnector", kv_role="kv_both")
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
