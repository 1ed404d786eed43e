"""Capacity planning: the sums against independent ones, against a real vLLM configuration, and the command itself."""

import json
import re

import pytest
import torch
from typer.testing import CliRunner
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.usage.usage_lib import UsageContext
from vllm.v1.kv_cache_interface import SlidingWindowSpec

import bundled
from deploy.cli import app
from deploy.model_shape import ModelError, presets, read_shape
from deploy.plan import GIB, Gpu, Load, PlanError, Prices, make_plan
from tests.unit.reports import compression
from tests.unit.tiny_models import SIZES

CARD = Gpu(24 * GIB)
ARTICLE = Load(prompt_tokens=512, output_tokens=32_768, users=100)


@pytest.fixture(scope="module")
def article():
    return make_plan(read_shape("qwen3-32b-4bit"), CARD, ARTICLE, compression(2048))


def write_config(folder, **changes):
    values = {name: size for name, size in SIZES.items() if size is not None}
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3", "head_dim": 16, **values, **changes}))
    return str(folder)


def test_a_32b_model_in_4_bits_has_the_size_that_its_layers_add_up_to(article):
    hidden, inner, layers, heads, kv_heads, head, vocabulary = 5120, 25600, 64, 64, 8, 128, 151_936
    projections = layers * hidden * (2 * heads * head + 2 * kv_heads * head + 3 * inner)
    norms = layers * (2 * hidden + 2 * head) + hidden
    # AWQ: every 128 weights of 4 bits share a scale of 16 and a zero point of 4.
    bits = projections * (4 + 20 / 128) + (2 * vocabulary * hidden + norms) * 16
    assert article.model.weights_bytes == int(bits) // 8


def test_a_chain_of_thought_of_32k_tokens_fits_a_24_gb_card_only_with_compression(article):
    assert article.bytes_per_token == 2 * 64 * 8 * 128 * 2
    assert article.bytes_per_block == 16 * article.bytes_per_token
    assert article.kv_bytes == int(0.92 * 24 * GIB) - article.model.weights_bytes - GIB
    without, compressed = article.without_compression, article.with_compression
    assert without.bytes_per_request == (512 + 32_768) * article.bytes_per_token > article.kv_bytes
    assert (without.fits, without.requests_per_replica, without.gpus) == (False, 0, None)
    assert compressed.fits
    assert compressed.bytes_per_request <= (512 + 2048 + 128 + 2 * 16) * article.bytes_per_token
    assert compressed.requests_per_replica == (article.total_blocks // compressed.blocks_per_request) == 4
    assert compressed.gpus == 25


def test_a_block_is_as_large_as_the_engine_makes_it():
    """What tests/fleet starts its engines with, and what `BLOCK_BYTES` reports of them."""
    plan = make_plan(read_shape(str(bundled.MODEL)), Gpu(GIB, 1, 0), ARTICLE, compression(256), block_size=32)
    config = json.loads((bundled.MODEL / "config.json").read_text())
    assert (
        plan.bytes_per_block
        == 32 * config["num_hidden_layers"] * 2 * config["num_key_value_heads"] * config["head_dim"] * 2
    )


def test_two_gpus_share_weights_and_heads_and_serve_as_one_replica(article):
    split = make_plan(article.model, CARD, ARTICLE, compression(2048), tensor_parallel=2)
    assert split.weights_bytes == article.weights_bytes // 2
    assert split.bytes_per_token == article.bytes_per_token // 2
    assert split.without_compression.fits
    assert split.without_compression.gpus == 2 * -(-100 // split.without_compression.requests_per_replica)


def test_heads_that_are_too_few_for_the_gpus_are_replicated():
    shape = read_shape("qwen3-32b-4bit")
    assert shape.bytes_per_token(64, 16) == shape.bytes_per_token(64, 8) == shape.bytes_per_token(64, 1) // 8


def test_sliding_layers_hold_their_window_whatever_the_length(tmp_path):
    kinds = ["sliding_attention", "sliding_attention", "full_attention"]
    shape = read_shape(write_config(tmp_path, layer_types=kinds, sliding_window=64, use_sliding_window=True))
    assert (shape.full_layers, shape.sliding_layers, shape.sliding_window) == (1, 2, 64)
    plans = [make_plan(shape, Gpu(GIB, 1, 0), Load(16, n, 1), compression(64), block_size=16) for n in (1000, 4000)]
    # 63 tokens before the one that decodes, and two in flight, from the middle of a block on.
    assert plans[0].sliding_bytes_per_request == plans[1].sliding_bytes_per_request == (5 + 1) * 16 * 2 * 2 * 2 * 16 * 2
    assert plans[0].bytes_per_token == 2 * 2 * 16 * 2


@pytest.mark.parametrize(
    ("prompt", "batched", "blocks"),
    [(1000, 2048, 63), (10_000, 2048, 261), (10_000, 256, 37)],
    ids=["whole prompt in flight", "two steps and the window", "two short steps and the window"],
)
def test_sliding_layers_hold_what_of_a_prompt_is_in_flight(tmp_path, prompt, batched, blocks):
    """As the engine admits hybrids (`Pool._others_bound`): a window begins to slide when its tokens are processed."""
    kinds = ["sliding_attention", "sliding_attention", "full_attention"]
    shape = read_shape(write_config(tmp_path, layer_types=kinds, sliding_window=64, use_sliding_window=True))
    load = Load(prompt, 1000, 1)
    plan = make_plan(shape, Gpu(GIB, 1, 0), load, compression(64), block_size=16, max_num_batched_tokens=batched)
    assert plan.sliding_bytes_per_request == blocks * 16 * 2 * 2 * 2 * 16 * 2
    spec = SlidingWindowSpec(16, num_kv_heads=2, head_size=16, dtype=torch.bfloat16, sliding_window=64)
    admitted = spec.max_admission_blocks_per_request(2 * batched, max_model_len=40_000)
    assert blocks == min(-(-(prompt + 2) // 16), admitted)


@pytest.mark.parametrize("gib", [24, 48, 69, 70, 80, 141, 160, 288])
def test_tokens_of_a_step_are_those_of_vllms_server_on_such_a_gpu(gib, monkeypatch):
    monkeypatch.setattr(current_platform, "get_device_total_memory", lambda: gib * GIB)
    monkeypatch.setattr(current_platform, "get_device_name", lambda: "a card")
    monkeypatch.setattr(current_platform, "is_cpu", lambda: False)
    tokens, _ = EngineArgs.get_batch_defaults(1)
    plan = make_plan(read_shape(str(bundled.MODEL)), Gpu(gib * GIB, 0.9, 0), Load(16, 1000, 1), compression(64))
    assert plan.max_num_batched_tokens == tokens[UsageContext.OPENAI_API_SERVER]


@pytest.mark.parametrize(("changes", "heads"), [({}, 1), ({"new_decoder_architecture": True, "num_kv_heads": 2}, 2)])
def test_kv_heads_are_falcons_too(tmp_path, changes, heads):
    values = {name: SIZES[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "falcon", **values, **changes}))
    assert read_shape(str(tmp_path)).kv_heads == heads


def test_weights_in_the_folder_count_as_they_lie_there(tmp_path):
    folder = write_config(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"x" * 1000)
    assert read_shape(folder).weights_bytes == 1000
    (tmp_path / "model.safetensors.index.json").write_text('{"metadata": {"total_size": 5000}}')
    assert read_shape(folder).weights_bytes == 5000
    assert read_shape(folder, weights_bytes=7).weights_bytes == 7
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    assert read_shape(folder).weights_bytes == 1000


@pytest.mark.parametrize(
    ("quantization", "bits"),
    [
        ({"quant_method": "gptq", "bits": 8, "group_size": -1}, 8),
        ({"quant_method": "awq", "w_bit": 4, "q_group_size": 16}, 4 + 20 / 16),
        ({"quant_method": "fp8"}, 8),
        ({"quant_method": "mxfp4"}, 4.25),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 32}}},
                "ignore": ["lm_head"],
            },
            4.5,
        ),
    ],
)
def test_quantization_says_how_many_bits_a_weight_has(tmp_path, quantization, bits):
    plain = read_shape(write_config(tmp_path)).weights_bytes
    quantized = read_shape(write_config(tmp_path, quantization_config=quantization)).weights_bytes
    packed = 3 * 32 * (2 * 4 * 16 + 2 * 2 * 16 + 3 * 48)
    assert plain - quantized == pytest.approx(packed * (16 - bits) / 8, abs=1)


@pytest.mark.parametrize(
    ("method", "key", "pattern"),
    [
        ("fp8", "modules_to_not_convert", "self_attn"),
        ("mxfp4", "modules_to_not_convert", "model.layers.*.self_attn"),
        ("fp8", "ignore", "re:.*self_attn.*"),
        ("fp8", "ignore", r"re:model\.layers\.\d+\.self_attn\.[qkvo]_proj$"),
    ],
)
def test_modules_that_a_quantization_leaves_out_weigh_what_they_did(tmp_path, method, key, pattern):
    plain = read_shape(write_config(tmp_path)).weights_bytes
    quantization = {"quant_method": method, key: [pattern, "re:self_attn"]}  # the last one: from a name's beginning
    quantized = read_shape(write_config(tmp_path, quantization_config=quantization)).weights_bytes
    assert plain - quantized == pytest.approx(3 * 3 * 32 * 48 * (16 - (4.25 if method == "mxfp4" else 8)) / 8, abs=1)


@pytest.mark.parametrize(
    ("changes", "sliding"),
    [
        ({"model_type": "starcoder2", "sliding_window": None}, 0),
        ({"model_type": "mistral", "sliding_window": 0}, 0),
        ({"sliding_window": 64, "use_sliding_window": False, "max_window_layers": 0}, 0),
        ({"sliding_window": 64, "layer_types": ["full_attention"] + ["sliding_attention"] * 2}, 0),
        ({"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 1}, 2),
    ],
)
def test_layers_slide_where_vllm_has_a_window_for_them(tmp_path, changes, sliding):
    shape = read_shape(write_config(tmp_path, **changes))
    assert (shape.full_layers, shape.sliding_layers) == (3 - sliding, sliding)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_type": "starcoder2", "sliding_window": 64}, "Every layer of .* window of 64 tokens"),
        ({"sliding_window": 4096, "use_sliding_window": True, "max_window_layers": 0}, "window of 4,096 tokens"),
        ({"model_type": "qwen2_5_vl"}, "Qwen2_5_VLTextConfig in .* --weights-gib"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq does not say .* --weights-gib"),
        ({"quantization_config": {"quant_method": "compressed-tensors", "config_groups": {}}}, "tensors does not say"),
        ({"quantization_config": {"quant_method": "magic"}}, "quantization magic is not known"),
        ({"layer_types": ["linear_attention"] * 3}, "layers of type linear_attention"),
        ({"model_type": "no-such-model"}, "not a model's config.json that transformers knows"),
        ({"dtype": "float64"}, "dtype of .* is float64"),
    ],
)
def test_a_model_that_cannot_be_planned_for_is_refused_with_a_sentence(tmp_path, changes, sentence):
    with pytest.raises(ModelError, match=sentence):
        read_shape(write_config(tmp_path, **changes))


def test_weights_that_do_not_fit_are_a_sentence():
    with pytest.raises(PlanError, match=r"weights of qwen3-32b take 61.0 GiB .* split the model"):
        make_plan(read_shape("qwen3-32b"), CARD, ARTICLE, compression(2048))
    with pytest.raises(PlanError, match="has 64 attention heads"):
        make_plan(read_shape("qwen3-32b"), CARD, ARTICLE, compression(2048), tensor_parallel=3)


def test_kv_heads_that_vllm_cannot_split_over_the_gpus_are_a_sentence(tmp_path):
    shape = read_shape(write_config(tmp_path, num_attention_heads=40, num_key_value_heads=10))
    for gpus in (5, 20):  # two heads each; each head twice
        assert make_plan(shape, CARD, ARTICLE, compression(2048), tensor_parallel=gpus)
    with pytest.raises(PlanError, match=r"tensor parallel is 4, but .* has 10 KV heads: choose"):
        make_plan(shape, CARD, ARTICLE, compression(2048), tensor_parallel=4)


def test_prices_and_power_are_of_the_gpus_of_each_side(article):
    prices = Prices(gpu_hour=0.5, gpu_watts=350, kilowatt_hour=0.3)
    priced = make_plan(article.model, CARD, ARTICLE, compression(2048), prices=prices).with_compression
    assert (priced.cost_per_hour, priced.kilowatts) == (12.5, 8.75)
    assert priced.energy_cost_per_hour == pytest.approx(2.625)


def test_the_command_prints_the_sums_and_writes_figures_and_picture(tmp_path):
    figures, picture = tmp_path / "plan.json", tmp_path / "plan.png"
    result = CliRunner().invoke(
        app,
        ["plan", "qwen3-32b-4bit", "--gpu-gib", "24", "--users", "100", "--json", str(figures), "--plot", str(picture)],
    )
    assert result.exit_code == 0, result.output
    for shown in ("31.21 G parameters × 4.16 bits", "18.00 GiB", "3.08 GiB", "256 KiB", "does not fit", "8.12 GiB"):
        assert shown in result.output
    written = json.loads(figures.read_text())
    assert written["without_compression"]["gpus"] is None
    assert written["with_compression"]["gpus"] == 25
    assert written["compression"]["budget"] == 2048
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere"], "There is no config.json at nowhere"),
        (["qwen3-8b", "--budget", "5"], "budget: Input should be greater than or equal to 32"),
    ],
)
def test_the_command_ends_with_a_sentence(arguments, sentence):
    result = CliRunner().invoke(app, ["plan", *arguments, "--gpu-gib", "24"])
    assert (result.exit_code, "Traceback" in result.output) == (1, False)
    assert sentence in re.sub(r"\s+", " ", result.output)


@pytest.mark.parametrize("option", ["--gpu-gib", "--overhead-gib", "--weights-gib"])
@pytest.mark.parametrize("size", ["inf", "1e308", "nan"])
def test_a_size_that_is_no_number_of_bytes_is_refused_by_name(option, size):
    result = CliRunner().invoke(app, ["plan", "qwen3-8b", "--gpu-gib", "24", option, size], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert f"Invalid value for '{option}'" in result.output


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[]", "it holds no JSON object"),
        ('{"model_type": "qwen3", "hidden_size": "x"}', "Validation error for field 'hidden_size'"),
    ],
)
def test_a_config_that_transformers_refuses_is_told_in_one_line(tmp_path, text, reason):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"is not a model.s config\.json that transformers knows") as raised:
        read_shape(str(tmp_path))
    assert reason in str(raised.value)
    assert "\n" not in str(raised.value)


def test_the_help_names_every_preset():
    assert ", ".join(presets()) == "qwen3-32b, qwen3-32b-4bit, qwen3-8b"
    for name in presets():
        assert name in CliRunner().invoke(app, ["plan", "--help"], env={"COLUMNS": "200"}).output
