"""Admission counts a request's bound, not its length: contexts far longer than the pool start, and are served."""

import inspect
from pathlib import Path

import pytest
from transformers import Qwen3Config
from vllm import SamplingParams
from vllm.v1.core.kv_cache_utils import update_kv_cache_capacity

from tests.engine.conftest import BLOCK, SIZES, EngineFactory, save_tiny_model
from tests.engine.test_exactness import assert_pool_whole, scheduler_of
from tests.unit.tiny_models import random_statistics
from triattention.bounds import blocks_bound
from triattention.config import CompressionConfig

LENGTH, POOL, BUDGET = 32_768, 4_096, 1_024
BLOCK_BYTES = 3 * 2 * 2 * 32 * BLOCK * 4
"""Layers, keys and values, KV heads, head_dim, tokens, bytes of fp32."""


@pytest.fixture(scope="module")
def long_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CompressionConfig]:
    config = Qwen3Config(**SIZES | {"max_position_embeddings": LENGTH})
    folder = tmp_path_factory.mktemp("long")
    random_statistics(config).save(folder / "statistics.safetensors")
    compression = CompressionConfig(
        budget=BUDGET, interval=128, window=128, statistics=folder / "statistics.safetensors"
    )
    return save_tiny_model(config, folder / "model"), compression


MEMORY = {"blocks": None, "kv_cache_memory_bytes": POOL // BLOCK * BLOCK_BYTES, "max_model_len": LENGTH}


def test_plain_vllm_refuses_to_start_there(engine: EngineFactory, long_model: tuple[Path, CompressionConfig]) -> None:
    with pytest.raises(ValueError, match=r"max seq len \(32768\)"):
        engine(None, model=long_model[0], **MEMORY)


def test_several_requests_of_the_full_length_run_at_once_without_preemption(
    engine: EngineFactory, long_model: tuple[Path, CompressionConfig], prompts: list[list[int]]
) -> None:
    model, compression = long_model
    llm = engine(compression, model=model, **MEMORY)
    scheduler = scheduler_of(llm)
    assert scheduler.total_blocks == POOL // BLOCK - 1
    names = []
    for number, prompt in enumerate(prompts[:3]):
        sampling = SamplingParams(temperature=0, max_tokens=LENGTH - len(prompt), ignore_eos=True, detokenize=False)
        names.append(f"long{number}")
        llm.llm_engine.add_request(names[-1], {"prompt_token_ids": prompt}, sampling)
    for step in range(1_700):
        llm.llm_engine.step()
        assert step < 3 or len(scheduler.running) == 3
    computed = sum(request.num_computed_tokens for request in scheduler.requests.values())
    assert computed > 3 * 1_650 > POOL
    for request_id, held in scheduler.held_blocks().items():
        assert held <= scheduler.pool.bound(scheduler.requests[request_id]) < POOL // BLOCK // 3
    assert scheduler.preemptions == 0
    assert scheduler.compacted[0].compactions >= 3 * 3
    llm.llm_engine.abort_request(names)
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
    assert_pool_whole(llm)


def test_vllms_own_figure_of_concurrency_is_the_compressed_one(
    engine: EngineFactory, long_model: tuple[Path, CompressionConfig]
) -> None:
    """The one that `update_kv_cache_capacity` prints at start ("Maximum concurrency for 32,768 tokens per request")."""
    model, compression = long_model
    scheduler = scheduler_of(engine(compression, model=model, **MEMORY))
    bound = blocks_bound(1, LENGTH, BLOCK, compression, in_flight_tokens=512)  # a whole prefill chunk in flight
    concurrency = scheduler.vllm_config.cache_config.kv_cache_max_concurrency
    assert concurrency == (POOL // BLOCK) / bound
    assert concurrency > 2
    assert concurrency > 15 * POOL / LENGTH
    assert "kv_cache_max_concurrency" in inspect.getsource(update_kv_cache_capacity)
