"""Features of vLLM under compaction, each against a reference that does not share our code or against plain vLLM."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Gemma2Config
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
from vllm.sampling_params import StructuredOutputsParams

from tests.engine.conftest import BLOCK, SIZES, VOCABULARY, EngineFactory, save_tiny_model
from tests.engine.reference import DenseReference
from tests.engine.test_exactness import assert_pool_whole, generate, scheduler_of
from tests.engine.test_support_matrix import HYBRID
from triattention.config import CompressionConfig, Selection


@pytest.fixture(scope="module")
def config(statistics: Path) -> CompressionConfig:
    return CompressionConfig(budget=128, interval=96, window=16, statistics=statistics)


def greedy(tokens: int, **more: object) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, **more)


def compactions(llm: LLM) -> int:
    return sum(manager.compactions for manager in scheduler_of(llm).compacted)


def logits_of(llm: LLM, prompt: list[int], tokens: int) -> tuple[torch.Tensor, int]:
    """All logits of every generated token, fp32 [tokens, vocabulary], and how many prompt tokens were cache hits."""
    sampling = greedy(tokens, logprobs=VOCABULARY)
    (output,) = llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
    steps = output.outputs[0].logprobs
    assert steps is not None
    logits = torch.tensor([[step[token].logprob for token in range(VOCABULARY)] for step in steps])
    return logits, output.num_cached_tokens or 0


def test_a_cache_hit_after_a_compaction_gives_bit_identical_logits_to_a_cold_run(
    engine: EngineFactory, config: CompressionConfig, prompts: list[list[int]]
) -> None:
    llm = engine(config, logprobs_mode="raw_logits", max_logprobs=VOCABULARY)
    prompt = prompts[3]
    before = compactions(llm)
    (answer,) = generate(llm, [prompt], 600)
    assert compactions(llm) - before >= 4
    follow_up = prompt + answer[:150] + [7, 8, 9]  # answers are published up to the first compaction only
    warm, hits = logits_of(llm, follow_up, 400)
    assert hits >= (len(prompt) + 150) // BLOCK * BLOCK
    again, hits_again = logits_of(llm, follow_up, 400)
    assert hits_again >= hits
    llm.reset_prefix_cache()
    cold, none = logits_of(llm, follow_up, 400)
    assert none == 0
    assert torch.equal(warm, cold)
    assert torch.equal(again, cold)


def test_sliding_layers_publish_nothing_of_a_compacted_request_either(
    engine: EngineFactory, prompts: list[list[int]], tmp_path: Path
) -> None:
    model = save_tiny_model(Gemma2Config(**SIZES | HYBRID), tmp_path / "model")
    config = CompressionConfig(budget=96, interval=64, window=16, policy="key_norm")
    llm = engine(
        config,
        model=model,
        blocks=400,
        prefix_cache_retention_interval=BLOCK,
        logprobs_mode="raw_logits",
        max_logprobs=VOCABULARY,
    )
    (answer,) = generate(llm, [prompts[1]], 600)
    follow_up = prompts[1] + answer[:400] + [7]
    logits_of(llm, follow_up, 3)  # full layers publish the prompt now, and would make hits of what was there already
    warm, hits = logits_of(llm, follow_up, 3)
    assert hits > 0
    llm.reset_prefix_cache()
    cold, none = logits_of(llm, follow_up, 3)
    assert none == 0
    assert torch.equal(warm, cold)


def test_each_of_several_sequences_of_a_request_gets_what_it_would_get_alone(
    engine: EngineFactory, config: CompressionConfig, prompts: list[list[int]]
) -> None:
    llm = engine(config)
    prompt = {"prompt_token_ids": prompts[3]}
    common = {"temperature": 1.0, "max_tokens": 500, "ignore_eos": True, "detokenize": False}
    (together,) = llm.generate([prompt], SamplingParams(n=3, seed=5, **common), use_tqdm=False)
    alone = [llm.generate([prompt], SamplingParams(seed=5 + i, **common), use_tqdm=False)[0] for i in range(3)]
    answers = [list(output.token_ids) for output in together.outputs]
    assert answers == [list(output.outputs[0].token_ids) for output in alone]
    assert len({tuple(answer) for answer in answers}) == 3
    assert_pool_whole(llm)


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_prompts_longer_than_the_budget_stay_whole_and_their_answers_equal_the_reference(
    engine: EngineFactory, config: CompressionConfig, tiny_model: Path, statistics: Path, asynchronous: bool
) -> None:
    llm = engine(config, async_scheduling=asynchronous, max_num_batched_tokens=128)
    prompt = [i * 7 % 511 for i in range(333)]
    (ours,) = generate(llm, [prompt], 500)
    expected, times = DenseReference(tiny_model, statistics).generate(prompt, 500, config, BLOCK, int(asynchronous))
    assert times >= 3
    assert ours == expected


def test_compressed_prompts_equal_the_reference_compacted_at_the_same_chunk_boundaries(
    engine: EngineFactory, config: CompressionConfig, tiny_model: Path, statistics: Path
) -> None:
    compress = config.model_copy(update={"prompt": "compress", "sinks": 4})
    llm = engine(compress, blocks=41, max_num_batched_tokens=128)
    prompt = [i * 7 % 511 for i in range(1500)]  # more than the pool of 1,280 tokens holds
    (ours,) = generate(llm, [prompt], 300)
    expected, times = DenseReference(tiny_model, statistics).generate(prompt, 300, compress, BLOCK, 0, chunk=128)
    assert times >= 8
    assert ours == expected
    assert_pool_whole(llm)


def truncated_to_fp8(numbers: torch.Tensor) -> torch.Tensor:
    """What vLLM's CPU kernels make of fp32 in an e4m3 cache: rounded towards zero."""
    size = numbers.abs().clamp(max=448)
    normal = (size.view(torch.int32) & -(1 << 20)).view(torch.float32)
    return torch.where(size < 2**-6, (size * 512).floor() / 512, normal).copysign(numbers)


@pytest.mark.skipif(
    not (torch.cpu._is_avx512_supported() or torch.cpu._is_amx_tile_supported()),
    reason="vLLM's fp8 cache is for CPUs with AVX-512 or AMX",
)
@pytest.mark.parametrize("selection", ["per_head", "per_layer_per_head"])
def test_an_fp8_cache_equals_the_reference_over_the_same_fp8_numbers(
    engine: EngineFactory,
    config: CompressionConfig,
    tiny_model: Path,
    statistics: Path,
    prompts: list[list[int]],
    selection: Selection,
) -> None:
    config = config.model_copy(update={"selection": selection})
    llm = engine(config, kv_cache_dtype="fp8")
    ours = generate(llm, prompts[2:], 400)
    reference = DenseReference(tiny_model, statistics, truncated_to_fp8)
    for prompt, tokens in zip(prompts[2:], ours, strict=True):
        expected, times = reference.generate(prompt, 400, config, BLOCK, in_flight=0)
        assert times >= 2
        assert tokens == expected
    rounded = reference.generate(prompts[3], 100, config, BLOCK, in_flight=0)[0]
    reference.stored = lambda numbers: numbers
    assert reference.generate(prompts[3], 100, config, BLOCK, in_flight=0)[0] != rounded, "fp8 changes nothing"


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A LoRA adapter of all attention projections, and the model with its weights merged in."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    generator, rank, weights = torch.Generator().manual_seed(3), 8, {}
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    for name, module in model.named_modules():
        if name.endswith(names):
            out, into = module.weight.shape
            a = torch.randn(rank, into, generator=generator) * 0.1
            b = torch.randn(out, rank, generator=generator) * 0.1
            weights[f"base_model.model.{name}.lora_A.weight"] = a
            weights[f"base_model.model.{name}.lora_B.weight"] = b
            module.weight.data += b @ a
    folder = tmp_path_factory.mktemp("lora")
    adapter, merged = folder / "adapter", folder / "merged"
    model.save_pretrained(merged)
    adapter.mkdir()
    save_file(weights, adapter / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": names, "bias": "none"}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    return adapter, merged


def test_lora_adapters_equal_the_reference_with_merged_weights_and_leave_the_base_model_alone(
    engine: EngineFactory,
    config: CompressionConfig,
    tiny_model: Path,
    statistics: Path,
    adapter: tuple[Path, Path],
    prompts: list[list[int]],
) -> None:
    """In batches of their own: in a mixed one vLLM's CPU kernels give the adapter to requests without (index -1)."""
    folder, merged = adapter
    llm = engine(config, enable_lora=True, max_lora_rank=8)
    lora = LoRARequest("tiny", 1, str(folder))
    answers = {}
    for model, request in ((merged, lora), (tiny_model, None)):
        (output,) = llm.generate([{"prompt_token_ids": prompts[2]}], greedy(450), lora_request=request, use_tqdm=False)
        answers[model] = list(output.outputs[0].token_ids)
        expected, times = DenseReference(model, statistics).generate(prompts[2], 450, config, BLOCK, in_flight=0)
        assert times >= 3
        assert answers[model] == expected
    assert answers[merged] != answers[tiny_model]


def test_structured_output_equals_the_reference_that_may_choose_among_the_same_tokens(
    engine: EngineFactory, config: CompressionConfig, tiny_model: Path, statistics: Path, prompts: list[list[int]]
) -> None:
    llm = engine(config, skip_tokenizer_init=False)
    pattern = StructuredOutputsParams(regex="(t0[0-4][0-9])+")  # the words of tokens 0 to 49
    (output,) = llm.generate(
        [{"prompt_token_ids": prompts[2]}], greedy(500, structured_outputs=pattern), use_tqdm=False
    )
    expected, times = DenseReference(tiny_model, statistics).generate(
        prompts[2], 500, config, BLOCK, in_flight=0, allowed=range(50)
    )
    assert times >= 3
    assert list(output.outputs[0].token_ids) == expected
    assert len(set(expected)) > 5


@pytest.mark.parametrize("selection", ["per_head", "per_layer_per_head"])
def test_two_tensor_parallel_ranks_select_and_answer_as_one(
    engine: EngineFactory, config: CompressionConfig, prompts: list[list[int]], selection: Selection
) -> None:
    """Two processes, one KV head each; a head's set depends on no other head, so ranks need not talk."""
    config = config.model_copy(update={"selection": selection, "budget": 64, "interval": 32})
    one = generate(engine(config), prompts, 250)
    llm = engine(config, tensor_parallel_size=2, distributed_executor_backend="mp")
    try:
        assert generate(llm, prompts, 250) == one
        assert compactions(llm) >= 16
        assert_pool_whole(llm)
    finally:
        # Idle ranks poll: they would slow the other tests down. (The whole core's shutdown would end this process's
        # process groups, which the other engines use.)
        llm.llm_engine.engine_core.engine_core.model_executor.shutdown()
