"""What an engine reports of its pinned prompts and first compactions, against what its own tables hold."""

import time
from pathlib import Path

from vllm.v1.metrics.stats import SchedulerStats

from tests.engine.conftest import BLOCK, EngineFactory
from tests.engine.test_exactness import scheduler_of
from tests.engine.test_living_with_vllm import add, step_until
from triattention.config import CompressionConfig
from triattention.report import EngineReport


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
