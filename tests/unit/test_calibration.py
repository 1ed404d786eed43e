"""Calibration averages exactly the queries that the attention layers rotate, query norm included."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    MistralConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from tests.unit.tiny_models import SIZES, llama, qwen3
from triattention.calibration import calibrate, captured_queries
from triattention.rope import find_rotation_module
from triattention.statistics import QueryStatistics

TEXT = ["w1 w2 w3 w4 w5 w6 w7 w8 w9 w10", "w11 w3 w5 w12 w13", "w20 w21 w22 w23 w24 w25 w26"]


def save_model(folder: Path, config: PreTrainedConfig, bos: bool = False, **parameters: float) -> Any:
    """A random model and a word-level tokenizer w1 .. w59 in `folder`, as transformers saves them."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.5 if "norm" in name else 0.2
            parameter.copy_(torch.randn_like(parameter) * spread + (1.0 if "norm" in name else 0.0))
    model.save_pretrained(folder)
    words = Tokenizer(WordLevel({"<s>": 0, "<unk>": 62} | {f"w{i}": i for i in range(1, 60)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    if bos:
        words.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>" if bos else None).save_pretrained(folder)
    return model.eval()


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def half_turn(x: Tensor, theta: float) -> Tensor:
    """RoPE by hand for [heads, tokens, head_dim], half split."""
    half = x.shape[-1] // 2
    phase = torch.arange(x.shape[1])[:, None] * theta ** (-torch.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * phase.cos() - b * phase.sin(), b * phase.cos() + a * phase.sin()), dim=-1)


def queries_by_hand(weights: dict[str, Tensor], ids: list[int], query_norm: bool) -> list[Tensor]:
    """Queries before RoPE of every layer, [q_heads, tokens, bands] complex: a forward pass from the weights
    alone.
    """
    eps, theta, head_dim = 1e-6, 10000.0, 16
    x = weights["model.embed_tokens.weight"][ids]
    causal = torch.full((len(ids), len(ids)), -torch.inf).triu(1)
    queries = []
    for layer in range(3):
        w = {
            name.removeprefix(f"model.layers.{layer}."): value
            for name, value in weights.items()
            if name.startswith(f"model.layers.{layer}.")
        }
        h = norm(x, w["input_layernorm.weight"], eps)
        q, k, v = ((h @ w[f"self_attn.{p}_proj.weight"].T).view(len(ids), -1, head_dim).transpose(0, 1) for p in "qkv")
        if query_norm:
            q, k = norm(q, w["self_attn.q_norm.weight"], eps), norm(k, w["self_attn.k_norm.weight"], eps)
        queries.append(torch.complex(q[..., : head_dim // 2], q[..., head_dim // 2 :]))
        k, v = k.repeat_interleave(2, dim=0), v.repeat_interleave(2, dim=0)
        attention = half_turn(q, theta) @ half_turn(k, theta).transpose(1, 2) / head_dim**0.5 + causal
        mixed = (attention.softmax(-1) @ v).transpose(0, 1).flatten(1)
        x = x + mixed @ w["self_attn.o_proj.weight"].T
        h = norm(x, w["post_attention_layernorm.weight"], eps)
        gate, up = h @ w["mlp.gate_proj.weight"].T, h @ w["mlp.up_proj.weight"].T
        x = x + (torch.nn.functional.silu(gate) * up) @ w["mlp.down_proj.weight"].T
    return queries


def means_by_hand(model: Any, chunks: list[list[int]], query_norm: bool) -> tuple[Tensor, Tensor]:
    weights = {name: value.detach() for name, value in model.state_dict().items()}
    runs = [torch.stack(queries_by_hand(weights, ids, query_norm)) for ids in chunks]
    queries = torch.cat(runs, dim=2)
    return queries.mean(2), queries.abs().mean(2)


def ids_of(text: str) -> list[int]:
    return [int(word[1:]) for word in text.split()]


RMS = {"rms_norm_eps": 1e-6}


@pytest.mark.parametrize(
    ("config", "query_norm"), [(qwen3(**RMS), True), (llama(**RMS), False)], ids=["qwen3", "llama"]
)
def test_statistics_equal_a_forward_pass_by_hand(tmp_path: Path, config: PreTrainedConfig, query_norm: bool) -> None:
    model = save_model(tmp_path, config)
    statistics = calibrate(tmp_path, TEXT, out=None)
    mean, magnitude = means_by_hand(model, [ids_of(t) for t in TEXT], query_norm)
    assert statistics.tokens == 22
    assert statistics.layers == (0, 1, 2)
    torch.testing.assert_close(statistics.query_mean, mean, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(statistics.query_magnitude, magnitude, atol=1e-4, rtol=1e-4)


def test_the_query_norm_of_qwen3_matters(tmp_path: Path) -> None:
    model = save_model(tmp_path, qwen3(**RMS))
    statistics = calibrate(tmp_path, TEXT, out=None)
    weights = dict(model.state_dict())
    weights["model.layers.0.self_attn.q_norm.weight"] = torch.ones(16)
    without = torch.cat([queries_by_hand(weights, ids_of(t), True)[0] for t in TEXT], dim=1).mean(1)
    assert (statistics.query_mean[0] - without).norm() / without.norm() > 0.1


def test_long_documents_run_in_chunks_from_position_zero(tmp_path: Path) -> None:
    model = save_model(tmp_path, llama(**RMS))
    statistics = calibrate(tmp_path, TEXT, out=None, chunk_tokens=4)
    chunks = [ids_of(t)[i : i + 4] for t in TEXT for i in range(0, len(ids_of(t)), 4)]
    mean, magnitude = means_by_hand(model, chunks, query_norm=False)
    torch.testing.assert_close(statistics.query_mean, mean, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(statistics.query_magnitude, magnitude, atol=1e-4, rtol=1e-4)


def test_chunks_are_no_longer_than_the_models_context(tmp_path: Path) -> None:
    save_model(tmp_path, llama(max_position_embeddings=8))
    seen: list[int] = []
    calibrate(tmp_path, TEXT[:1], out=None, on_progress=lambda done, _: seen.append(done))
    assert seen == [8, 10, 10]


def test_chunks_begin_with_the_tokenizers_bos(tmp_path: Path) -> None:
    model = save_model(tmp_path, llama(**RMS), bos=True)
    statistics = calibrate(tmp_path, ["w1 w2 w3 w4 w5", "<s> w6"], out=None, chunk_tokens=4)
    mean, _ = means_by_hand(model, [[0, 1, 2, 3], [0, 4, 5], [0, 6]], query_norm=False)
    assert statistics.tokens == 9
    torch.testing.assert_close(statistics.query_mean, mean, atol=1e-4, rtol=1e-4)


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    save_model(tmp_path, llama(**RMS))
    (tmp_path / "text").write_text("w1 w2\nw3 w4\n\nw5 w6")
    from_file = calibrate(tmp_path, tmp_path / "text", out=None)
    from_list = calibrate(tmp_path, ["w1 w2 w3 w4 w5 w6"], out=None)
    assert torch.equal(from_file.query_mean, from_list.query_mean)


def test_stops_at_max_tokens_and_reports_progress(tmp_path: Path) -> None:
    save_model(tmp_path, llama())
    calls: list[tuple[int, int]] = []
    endless = (TEXT[0] for _ in iter(int, 1))
    statistics = calibrate(
        tmp_path, endless, None, chunk_tokens=8, max_tokens=21, on_progress=lambda a, b: calls.append((a, b))
    )
    assert statistics.tokens == 21
    assert calls == [(8, 21), (10, 21), (18, 21), (20, 21), (21, 21), (21, 21)]


def test_the_written_file_loads_for_its_model(tmp_path: Path) -> None:
    config = qwen3()
    save_model(tmp_path, config)
    made = calibrate(tmp_path, TEXT, out=tmp_path / "out" / "statistics.safetensors")
    loaded = QueryStatistics.load(tmp_path / "out" / "statistics.safetensors", config)
    assert torch.equal(loaded.query_mean, made.query_mean)
    assert loaded.model_id == tmp_path.name


OTHERS = {
    "qwen2": Qwen2Config(**SIZES),
    "mistral": MistralConfig(**SIZES),
    "phi3": Phi3Config(**SIZES, rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5}),
}


@pytest.mark.parametrize("config", OTHERS.values(), ids=OTHERS.keys())
def test_other_architectures_need_no_code_of_their_own(config: PreTrainedConfig) -> None:
    """Without a query norm, what is captured is what the layer's query projection gave."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    projected: list[Tensor] = []
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "qkv_proj")):
            module.register_forward_hook(lambda _m, _i, out: projected.append(out[..., :32].detach()))
    captured: dict[int, Tensor] = {}
    with torch.inference_mode(), captured_queries(model, lambda layer, q, _r: captured.update({layer: q})):
        model(torch.arange(20)[None])
    assert list(captured) == [0, 1, 2]
    for layer, q in captured.items():
        assert torch.equal(q, projected[layer].view(1, 20, 4, 8).transpose(1, 2))


def test_refuses_an_architecture_that_slices_heads_before_rotation(tmp_path: Path) -> None:
    save_model(tmp_path, PhiConfig(**SIZES, partial_rotary_factor=0.5))
    with pytest.raises(ValueError, match="this architecture cannot be calibrated"):
        calibrate(tmp_path, TEXT, out=None)


def test_the_models_code_is_put_back_also_after_an_error(tmp_path: Path) -> None:
    model = save_model(tmp_path, llama())
    before = find_rotation_module(model).apply_rotary_pos_emb

    def stop(_done: int, _total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(tmp_path, TEXT, None, on_progress=stop)
    assert find_rotation_module(model).apply_rotary_pos_emb is before


def test_refuses_no_text_and_a_bare_string(tmp_path: Path) -> None:
    save_model(tmp_path, llama())
    with pytest.raises(ValueError, match="gave no tokens"):
        calibrate(tmp_path, ["", ""], None)
    with pytest.raises(ValueError, match="single string"):
        calibrate(tmp_path, "w1 w2", None)


def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    """What one chunk leaves behind is only the sums: no tensor per chunk stays alive."""
    save_model(tmp_path, llama())
    alive: list[int] = []

    def count(_done: int, _total: int) -> None:
        alive.append(sum(issubclass(type(o), Tensor) for o in gc.get_objects()))

    calibrate(tmp_path, TEXT * 2, None, on_progress=count)
    assert alive[-2] <= alive[2]
