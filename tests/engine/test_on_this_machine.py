"""What a CPU asks for where the settings leave it open. tests/fleet starts two engines of so many blocks each."""

import pytest
import torch

from triattention.vllm import on_this_machine


@pytest.mark.parametrize(("has_bf16", "dtype"), [(True, "auto"), (False, "float32")])
def test_dtype_auto_is_float32_where_bf16_is_only_emulated(
    has_bf16: bool, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has_bf16)
    assert on_this_machine({"dtype": "auto"})["dtype"] == dtype
    assert on_this_machine({}).get("dtype", "auto") == dtype
    assert on_this_machine({"dtype": "bfloat16"}) == {"dtype": "bfloat16"}


def test_a_pool_of_so_many_blocks_is_not_measured_against_the_whole_memory() -> None:
    counted = on_this_machine({"dtype": "float32", "num_gpu_blocks_override": 100})
    assert counted["num_gpu_blocks_override"] == 100
    assert counted["kv_cache_memory_bytes"] < 1 << 30
    assert "kv_cache_memory_bytes" not in on_this_machine({})
