"""What an engine runs with where the settings leave it open. tests/fleet starts two engines of so many blocks each."""

from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.async_llm import AsyncLLM

from replicas.engine import Engine
from triattention.vllm import on_this_machine


async def test_an_open_setting_is_what_vllms_own_server_takes(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On an H100 a server's steps are of 8,192 tokens, and those of an engine that says not what it is for of 2,048."""
    batched = {UsageContext.OPENAI_API_SERVER: 300, UsageContext.LLM_CLASS: 301}
    monkeypatch.setattr(EngineArgs, "get_batch_defaults", lambda *_: (batched, {}))
    made = []

    class Made(Exception): ...

    def stop(self: AsyncLLM, *, vllm_config: Any, **_: Any) -> None:
        made.append(vllm_config)
        raise Made

    monkeypatch.setattr(AsyncLLM, "__init__", stop)
    arguments = {"model": str(tiny_model), "dtype": "float32", "max_model_len": 1024, "max_num_seqs": 8}
    with pytest.raises(Made):
        await Engine.start(arguments, None, lambda report: None, lambda request, seconds: None)
    assert [config.scheduler_config.max_num_batched_tokens for config in made] == [300]
    assert AsyncEngineArgs(**arguments).create_engine_config().scheduler_config.max_num_batched_tokens == 2048


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
