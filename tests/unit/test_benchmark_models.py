"""The benchmark's model has the proportions that its docstring claims, and its loads fit where they can."""

from pathlib import Path

import pytest
from safetensors import safe_open
from transformers import AutoConfig

from benchmarks.loads import AMPLE, TIGHT
from benchmarks.models import QWEN3_8B, TOKENS_STAND_FOR, model
from benchmarks.sweep import CellLoad
from triattention.statistics import QueryStatistics


def weight_bytes(folder: Path) -> int:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118  (not a dict)


def test_kv_memory_and_weights_stand_to_each_other_as_in_the_deployment() -> None:
    with model("deployment") as made:
        config = AutoConfig.from_pretrained(made.path)
        kv = config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim * 2
        here = TIGHT.pool_tokens * kv / weight_bytes(made.path)
        there = TIGHT.pool_tokens * TOKENS_STAND_FOR * QWEN3_8B["kv_bytes_per_token"] / QWEN3_8B["weight_bytes"]
        assert here == pytest.approx(there, rel=0.05)
        assert config.num_attention_heads // config.num_key_value_heads == 32 // 8
        QueryStatistics.load(made.statistics, config, range(config.num_hidden_layers))
    assert not made.path.exists()


@pytest.mark.parametrize(("pool_tokens", "fits"), [(512, False), (544, True), (4096, True)])
def test_plain_vllm_takes_part_in_a_cell_whose_memory_holds_one_of_its_requests(pool_tokens: int, fits: bool) -> None:
    assert CellLoad(requests=32, output_tokens=300, pool_tokens=pool_tokens, budget=256).fits_whole == fits


def test_the_published_loads_have_the_length_that_they_were_measured_with() -> None:
    assert (TIGHT.max_model_len, AMPLE.max_model_len) == (4096, 4096)
