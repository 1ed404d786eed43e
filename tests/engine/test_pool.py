"""Admission where requests share blocks, are preempted, or hold blocks of several groups: none waits for ever, and with
`reserve_growth` none is preempted.
"""

import random
from pathlib import Path
from typing import Literal

import pytest
from transformers import Gemma2Config
from vllm import LLM, SamplingParams
from vllm.config import ModelConfig
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.v1.request import Request, RequestStatus

from tests.engine.conftest import SIZES, VOCABULARY, EngineFactory, save_tiny_model
from tests.engine.test_exactness import assert_pool_whole, scheduler_of
from tests.engine.test_living_with_vllm import add, step_until
from tests.engine.test_support_matrix import HYBRID
from triattention.config import CompressionConfig

CONFIG = CompressionConfig(budget=96, interval=64, window=16, policy="key_norm")


def tokens(count: int, seed: int = 1) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(VOCABULARY) for _ in range(count)]


def run(llm: LLM, steps: int) -> dict[str, str | None]:
    """Why each request ended. Fails if one did not within `steps`, or ever held more than its bound."""
    scheduler, reasons = scheduler_of(llm), {}
    for _ in range(steps):
        if not llm.llm_engine.has_unfinished_requests():
            break
        for output in llm.llm_engine.step():
            if output.finished:
                reasons[output.request_id] = output.outputs[0].finish_reason
        for request_id, held in scheduler.held_blocks().items():
            assert held <= scheduler.pool.bound(scheduler.requests[request_id])
    waiting = list(scheduler.requests)
    llm.llm_engine.abort_request(waiting)
    assert not waiting, f"still there after {steps} steps"
    assert_pool_whole(llm)
    return reasons


def test_a_preempted_request_comes_back_where_whole_chunks_of_it_would_not_fit(engine: EngineFactory) -> None:
    llm = engine(CONFIG, blocks=41, max_num_batched_tokens=1024)  # a chunk alone is 32 blocks
    add(llm, "a", tokens(200), 1200)
    step_until(llm, "a", 900)
    assert llm.llm_engine.reset_prefix_cache(reset_running_requests=True)
    assert run(llm, 1000) == {"a": "length"}


def test_preempted_requests_come_back_between_others_of_a_higher_priority(engine: EngineFactory) -> None:
    eager = CONFIG.model_copy(update={"reserve_growth": False})
    llm = engine(eager, blocks=41, max_num_batched_tokens=1024, scheduling_policy="priority")
    add(llm, "old", tokens(200), 1300)
    step_until(llm, "old", 1150)  # 43 blocks if they came back whole
    sampling = SamplingParams(temperature=0, max_tokens=300, ignore_eos=True, detokenize=False)
    for i in range(4):
        prompt = {"prompt_token_ids": tokens(300, seed=i + 2)}
        llm.llm_engine.add_request(f"new{i}", prompt, sampling, priority=-1)
    before = scheduler_of(llm).preemptions
    assert set(run(llm, 2500).values()) == {"length"}
    assert scheduler_of(llm).preemptions > before


def test_blocks_that_requests_share_are_no_reserve_for_their_growth(engine: EngineFactory) -> None:
    """A request that drops blocks of which another holds a share grows again, but the pool got nothing back."""
    config = CompressionConfig(budget=128, interval=96, window=16, policy="key_norm")
    llm = engine(config, blocks=18, max_num_batched_tokens=256, max_model_len=2048)
    prompt = tokens(37)
    add(llm, "writer", prompt, 800)
    written = step_until(llm, "writer", 205)
    add(llm, "reader", prompt + written[:200], 800)  # 7 of its blocks are the writer's
    assert run(llm, 3000) == {"writer": "length", "reader": "length"}
    assert scheduler_of(llm).preemptions == 0


def test_a_pinned_prompt_that_requests_share_counts_once(engine: EngineFactory) -> None:
    llm = engine(CONFIG, blocks=41)  # three whole bounds of 17 blocks do not fit in 40, but 11 + 3 * 6 blocks do
    prompt = tokens(330)
    for i in range(3):
        add(llm, f"sibling{i}", [*prompt, i], 700)
        step_until(llm, f"sibling{i}", 1)
    assert len(scheduler_of(llm).running) == 3
    assert set(run(llm, 1000).values()) == {"length"}
    assert scheduler_of(llm).preemptions == 0


@pytest.fixture(scope="module")
def wide_hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = Gemma2Config(**SIZES | HYBRID | {"sliding_window": 256})
    return save_tiny_model(config, tmp_path_factory.mktemp("wide") / "model")


def test_blocks_of_sliding_layers_are_reserved_as_well(engine: EngineFactory, wide_hybrid: Path) -> None:
    llm = engine(CONFIG, blocks=51, model=wide_hybrid)
    for i in range(6):
        add(llm, f"r{i}", tokens(37, seed=i), 600)
    assert set(run(llm, 4000).values()) == {"length"}
    assert scheduler_of(llm).preemptions == 0


def test_a_request_that_the_groups_together_have_no_room_for_ends_at_once(
    engine: EngineFactory, wide_hybrid: Path
) -> None:
    llm = engine(CONFIG, blocks=51, model=wide_hybrid)
    add(llm, "large", tokens(800), 3000)  # 31 blocks of full layers and 25 of sliding ones
    add(llm, "small", tokens(20), 20)
    assert run(llm, 100) == {"large": "error", "small": "length"}


def test_chunks_that_a_threshold_shortens_only_in_company_do_not_make_a_request_wait_for_ever(
    engine: EngineFactory,
) -> None:
    config = CONFIG.model_copy(update={"prompt": "compress"})
    arguments = {"max_num_batched_tokens": 2048, "long_prefill_token_threshold": 128}
    with pytest.raises(ValueError, match="larger than the available KV cache memory"):
        engine(config, blocks=41, **arguments)
    roomy = engine(config, blocks=91, **arguments)
    add(roomy, "alone", tokens(2500), 50)
    assert run(roomy, 200) == {"alone": "length"}


def test_max_tokens_beyond_the_context_length_do_not_count(engine: EngineFactory) -> None:
    config = CompressionConfig(budget=1024, interval=64, window=16, policy="key_norm")
    llm = engine(config, blocks=34, max_model_len=1024)
    add(llm, "generous", tokens(500), 5000)
    assert run(llm, 600) == {"generous": "length"}


def test_a_prompt_that_is_streamed_in_pieces_is_refused(engine: EngineFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = engine(CONFIG, blocks=41)
    scheduler, said = scheduler_of(llm), []
    monkeypatch.setattr("triattention.vllm.scheduler.logger.error", lambda text, *values: said.append(text % values))
    sampling = SamplingParams(temperature=0, max_tokens=20)
    sampling.update_from_generation_config({}, None)
    core = llm.llm_engine.engine_core.engine_core  # type: ignore[attr-defined]
    for _ in range(2):  # the second piece comes before the first was answered
        scheduler.add_request(
            Request("s", tokens(40), sampling, None, block_hasher=core.request_block_hasher, resumable=True)
        )
    outputs, _ = core.step()
    assert [(output.request_id, str(output.finish_reason)) for output in outputs[0].outputs] == [("s", "error")]
    assert "its prompt is streamed in pieces (resumable is True)" in said[0]
    core.step()
    assert_pool_whole(llm)


@pytest.mark.parametrize("prompt", ["pin", "compress"])
def test_an_image_read_in_both_directions_is_refused_in_a_compressed_prompt(
    engine: EngineFactory, monkeypatch: pytest.MonkeyPatch, prompt: Literal["pin", "compress"]
) -> None:
    llm = engine(CONFIG.model_copy(update={"prompt": prompt}), blocks=41)
    scheduler, said = scheduler_of(llm), []
    monkeypatch.setattr("triattention.vllm.scheduler.logger.error", lambda text, *values: said.append(text % values))
    monkeypatch.setattr(scheduler.vllm_config.model_config, "is_mm_prefix_lm", True)
    sampling = SamplingParams(temperature=0, max_tokens=20)
    sampling.update_from_generation_config({}, None)
    image = MultiModalFeatureSpec(None, "image", "a picture", PlaceholderRange(offset=4, length=16))
    scheduler.add_request(Request("text", tokens(40), sampling, None))
    scheduler.add_request(Request("image", tokens(40), sampling, None, mm_features=[image]))
    refused = ["image"] if prompt == "compress" else []
    assert [request.request_id for request in scheduler.refused] == refused
    assert ["prompt is compress" in sentence for sentence in said] == [True] * len(refused)
    scheduler.finish_requests(["text", "image"], RequestStatus.FINISHED_ABORTED)
    assert_pool_whole(llm)


def test_an_image_that_shifts_the_positions_after_it_is_refused(
    engine: EngineFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = engine(CONFIG, blocks=41)
    scheduler, said = scheduler_of(llm), []
    monkeypatch.setattr("triattention.vllm.scheduler.logger.error", lambda text, *values: said.append(text % values))
    monkeypatch.setattr(ModelConfig, "uses_mrope", True)
    sampling = SamplingParams(temperature=0, max_tokens=20)
    sampling.update_from_generation_config({}, None)
    image = MultiModalFeatureSpec(None, "image", "a picture", PlaceholderRange(offset=4, length=16))
    scheduler.add_request(Request("text", tokens(40), sampling, None))
    scheduler.add_request(Request("image", tokens(40), sampling, None, mm_features=[image]))
    assert [request.request_id for request in scheduler.refused] == ["image"]
    assert said == [
        "Request image is refused: its image, video or audio shifts the positions of the tokens after it (M-RoPE), but "
        "KV compression scores keys from positions that count tokens; send text alone, or serve the model without the "
        "triattention settings."
    ]
    scheduler.finish_requests(["text", "image"], RequestStatus.FINISHED_ABORTED)
    assert_pool_whole(llm)
