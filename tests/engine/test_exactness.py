"""The engine's greedy tokens against a dense fp32 reference with the same evictions, and against plain vLLM."""

from pathlib import Path

import pytest
from vllm import LLM, SamplingParams

from tests.engine.conftest import BLOCK, EngineFactory
from tests.engine.reference import DenseReference
from triattention.config import CompressionConfig
from triattention.vllm.scheduler import CompactionScheduler

TOKENS = 1000


def generate(llm: LLM, prompts: list[list[int]], tokens: int = TOKENS) -> list[list[int]]:
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def scheduler_of(llm: LLM) -> CompactionScheduler:
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler  # type: ignore[attr-defined]
    assert isinstance(scheduler, CompactionScheduler)
    return scheduler


def assert_pool_whole(llm: LLM) -> None:
    scheduler = scheduler_of(llm)
    assert scheduler.held_blocks() == {}
    assert scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == scheduler.total_blocks


@pytest.mark.parametrize("selection", ["per_head", "per_layer_per_head"])
@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_greedy_tokens_equal_a_dense_reference_with_the_same_evictions(
    engine: EngineFactory,
    tiny_model: Path,
    statistics: Path,
    prompts: list[list[int]],
    selection: str,
    asynchronous: bool,
) -> None:
    config = CompressionConfig(budget=128, interval=96, window=16, selection=selection, statistics=statistics)  # type: ignore[arg-type]
    llm = engine(config, async_scheduling=asynchronous)
    scheduler = scheduler_of(llm)
    assert scheduler.vllm_config.scheduler_config.async_scheduling is asynchronous
    assert scheduler.kv_cache_manager.enable_caching
    before = scheduler.compacted[0].compactions

    ours = generate(llm, prompts)

    reference = DenseReference(tiny_model, statistics)
    compactions = 0
    for prompt, tokens in zip(prompts, ours, strict=True):
        expected, times = reference.generate(prompt, TOKENS, config, BLOCK, in_flight=int(asynchronous))
        assert times >= 6
        assert tokens == expected
        compactions += times
    assert scheduler.compacted[0].compactions - before == compactions
    assert_pool_whole(llm)


def test_evictions_change_the_tokens_of_this_model(
    engine: EngineFactory, statistics: Path, prompts: list[list[int]]
) -> None:
    """Otherwise the exactness tests could not fail."""
    small = CompressionConfig(budget=128, interval=96, window=16, statistics=statistics)
    assert generate(engine(small, async_scheduling=True), prompts) != generate(engine(None), prompts)


def test_a_budget_larger_than_the_request_gives_plain_vllms_tokens(
    engine: EngineFactory, statistics: Path, prompts: list[list[int]]
) -> None:
    ample = CompressionConfig(budget=2048, interval=128, window=16, statistics=statistics)
    llm = engine(ample)
    assert generate(llm, prompts) == generate(engine(None), prompts)
    assert scheduler_of(llm).compacted[0].compactions == 0


def test_all_layers_are_scored_and_moved_in_one_operation(engine: EngineFactory, statistics: Path) -> None:
    """On a CPU vLLM lays them evenly spaced in one memory: no loop over layers is needed."""
    small = CompressionConfig(budget=128, interval=96, window=16, statistics=statistics)
    core = engine(small, async_scheduling=True).llm_engine.engine_core.engine_core  # type: ignore[attr-defined]
    (compactor,) = core.model_executor.driver_worker.worker.compactors.values()
    for cache in (compactor.keys, compactor.values):
        assert cache.all_layers is not None
        assert len(cache.all_layers) == len(cache.layers) == 3
