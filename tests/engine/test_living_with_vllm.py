"""Compaction beside vLLM's own features: prefix caching, preemption, aborts, admission, refusals at start."""

from pathlib import Path

import pytest
import torch
from vllm import LLM, SamplingParams

from tests.engine.conftest import BLOCK, EngineFactory
from tests.engine.test_exactness import assert_pool_whole, generate, scheduler_of
from triattention.bounds import blocks_bound
from triattention.config import CompressionConfig
from triattention.vllm.orders import CompactionOrder, orders_of


@pytest.fixture(scope="module")
def config(statistics: Path) -> CompressionConfig:
    return CompressionConfig(budget=128, interval=96, window=16, statistics=statistics)


def add(llm: LLM, name: str, prompt: list[int], tokens: int) -> None:
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, sampling)


def step_until(llm: LLM, name: str, tokens: int) -> list[int]:
    """Step the engine until request `name` has at least `tokens` output tokens or ended."""
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            if output.request_id == name and (output.finished or len(output.outputs[0].token_ids) >= tokens):
                return list(output.outputs[0].token_ids)
    raise AssertionError(f"{name} never reached {tokens} tokens")


def recorded_orders(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> list[CompactionOrder]:
    """Every order that the scheduler sends from now on."""
    scheduler, orders = scheduler_of(llm), []
    schedule = scheduler.schedule

    def recording(*args, **kwargs):  # type: ignore[no-untyped-def]
        output = schedule(*args, **kwargs)
        orders.extend(orders_of(output))
        return output

    monkeypatch.setattr(scheduler, "schedule", recording)
    return orders


def test_follow_up_turns_hit_the_cache_and_get_the_tokens_of_a_cold_run(
    engine: EngineFactory, config: CompressionConfig, prompts: list[list[int]]
) -> None:
    llm = engine(config)
    llm.reset_prefix_cache()
    first = generate(llm, prompts, 600)
    follow_ups = [p + tokens[:200] + [7, 8, 9] for p, tokens in zip(prompts, first, strict=True)]
    sampling = SamplingParams(temperature=0, max_tokens=300, ignore_eos=True, detokenize=False)
    warm = llm.generate([{"prompt_token_ids": p} for p in follow_ups], sampling, use_tqdm=False)
    assert all(output.num_cached_tokens >= BLOCK for output in warm)
    llm.reset_prefix_cache()
    cold = generate(llm, follow_ups, 300)
    assert [list(output.outputs[0].token_ids) for output in warm] == cold
    assert_pool_whole(llm)


def test_a_live_block_that_another_request_shares_is_never_written(
    engine: EngineFactory,
    config: CompressionConfig,
    prompts: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    llm = engine(config)
    llm.reset_prefix_cache()
    orders = recorded_orders(llm, monkeypatch)
    prompt = prompts[1]
    add(llm, "writer", prompt, 500)
    so_far = step_until(llm, "writer", 210)  # just before its first compaction at 64 + 128 + 96 tokens
    shared_prompt = prompt + so_far[:200]
    add(llm, "reader", shared_prompt, 200)
    reader = step_until(llm, "reader", 200)
    assert any(order.protected_blocks for order in orders), "nothing was shared: the test tests nothing"
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
    assert_pool_whole(llm)
    llm.reset_prefix_cache()
    assert generate(llm, [shared_prompt], 200) == [reader]


def test_requests_never_hold_more_than_their_bound_and_none_is_preempted(
    engine: EngineFactory, config: CompressionConfig, prompts: list[list[int]]
) -> None:
    llm = engine(config, blocks=41)  # room for four bounded requests, not for two whole ones
    scheduler = scheduler_of(llm)
    peaks: dict[str, int] = {}
    for i, prompt in enumerate(prompts * 2):
        add(llm, f"r{i}", prompt, 1000)
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
        for request_id, blocks in scheduler.held_blocks().items():
            bound = scheduler.pool.bound(scheduler.requests[request_id])
            assert blocks <= bound
            peaks[request_id] = max(peaks.get(request_id, 0), blocks)
    assert scheduler.preemptions == 0
    assert max(peaks.values()) == blocks_bound(101, 1101, BLOCK, config, 1)
    assert_pool_whole(llm)


def test_preempted_requests_resume_within_the_pool_and_finish(
    engine: EngineFactory, config: CompressionConfig, prompts: list[list[int]]
) -> None:
    eager = config.model_copy(update={"reserve_growth": False})
    llm = engine(eager, blocks=41, max_num_batched_tokens=128)
    outputs = generate(llm, prompts * 2, 600)
    assert [len(tokens) for tokens in outputs] == [600] * 8
    assert scheduler_of(llm).preemptions > 0
    assert_pool_whole(llm)


@pytest.mark.parametrize("steps", [1, 2, 150, 330, 331, 332, 333])
def test_aborting_at_any_step_leaves_the_pool_whole(
    engine: EngineFactory, config: CompressionConfig, prompts: list[list[int]], steps: int
) -> None:
    llm = engine(config, async_scheduling=True)
    for i, prompt in enumerate(prompts):
        add(llm, f"abort{steps}-{i}", prompt, 1000)
    for _ in range(steps):
        llm.llm_engine.step()
    llm.llm_engine.abort_request([f"abort{steps}-{i}" for i in range(len(prompts))])
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
    assert_pool_whole(llm)


def test_a_request_that_can_never_fit_ends_at_once_and_takes_nothing_with_it(
    engine: EngineFactory, config: CompressionConfig, prompts: list[list[int]]
) -> None:
    llm = engine(config, blocks=41)
    too_long = [i % 500 for i in range(1400)]  # 44 pinned blocks alone
    add(llm, "fits", prompts[0], 300)
    add(llm, "too long", too_long, 100)
    reasons = {}
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            if output.finished:
                reasons[output.request_id] = output.outputs[0].finish_reason
    assert reasons == {"fits": "length", "too long": "error"}
    assert_pool_whole(llm)


def test_long_contexts_start_and_serve_on_a_pool_far_smaller_than_one_of_them(
    engine: EngineFactory, config: CompressionConfig, prompts: list[list[int]]
) -> None:
    llm = engine(config, blocks=41, max_model_len=8192)  # 1,312 tokens of KV
    (tokens,) = generate(llm, prompts[:1], 3000)
    assert len(tokens) == 3000
    assert_pool_whole(llm)


def test_prompts_longer_than_the_pool_are_compressed_at_chunk_boundaries(
    engine: EngineFactory, config: CompressionConfig
) -> None:
    llm = engine(config.model_copy(update={"prompt": "compress"}), blocks=41, max_num_batched_tokens=128)
    prompt = [i * 7 % 511 for i in range(2500)]
    (tokens,) = generate(llm, [prompt], 200)
    assert len(tokens) == 200
    assert scheduler_of(llm).compacted[0].compactions > 10
    assert_pool_whole(llm)


def test_logprobs_stay_finite_across_compactions(engine: EngineFactory, config: CompressionConfig) -> None:
    llm = engine(config)
    sampling = SamplingParams(temperature=0, max_tokens=400, logprobs=3, ignore_eos=True, detokenize=False)
    (output,) = llm.generate([{"prompt_token_ids": [1, 2, 3]}], sampling, use_tqdm=False)
    logprobs = output.outputs[0].logprobs
    assert logprobs is not None
    assert all(torch.isfinite(torch.tensor([v.logprob for v in step.values()])).all() for step in logprobs)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "speculative decoding"),
    ],
)
def test_unsupported_settings_are_refused_at_start(
    engine: EngineFactory, config: CompressionConfig, arguments: dict[str, object], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        engine(config, **arguments)


def test_missing_statistics_are_refused_at_start(engine: EngineFactory, config: CompressionConfig) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        engine(config.model_copy(update={"statistics": Path("nowhere.safetensors")}))
