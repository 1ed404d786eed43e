"""Token-wise access to vLLM's key and value layouts, checked against vLLM's own store kernels."""

from types import SimpleNamespace

import pytest
import torch
from vllm import _custom_ops as ops

from tests.engine.interpreted_store import store
from tests.unit.interpreted import interpreter
from triattention import kernels
from triattention.kernels import HoleFills, LiveRegion, LiveRegions, PagedCache
from triattention.vllm.layout import CPU_LAYOUTS, FP8, Layout, as_numbers, gpu_caches, split_cpu_cache

HAS_AVX512, HAS_AMX = torch.cpu._is_avx512_supported(), torch.cpu._is_amx_tile_supported()


@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("dtype", ["auto", "fp8_e4m3", "fp8_e5m2"])
@pytest.mark.parametrize("layout", CPU_LAYOUTS, ids=lambda layout: layout.name)
def test_gather_reads_what_vllm_stored_and_compaction_moves_whole_tokens(
    layout: Layout, dtype: str, head_dim: int
) -> None:
    if layout.name == "amx" and not HAS_AMX:
        pytest.skip("vLLM's amx layout is for CPUs with AMX")
    if dtype in FP8 and not (HAS_AVX512 or HAS_AMX):
        pytest.skip("vLLM's fp8 cache is for CPUs with AVX-512 or AMX")
    heads, block, blocks = 2, 64, 4
    model_dtype = torch.bfloat16 if layout.name == "amx" else torch.float32
    stored_dtype = torch.uint8 if dtype in FP8 else model_dtype
    cache = torch.full((blocks, heads, block, 2 * head_dim), 111, dtype=stored_dtype)
    key_part, value_part = split_cpu_cache(cache)
    # Numbers that the cache holds exactly: vLLM's kernels for fp8 do not round to nearest.
    exact = FP8.get(dtype, model_dtype)
    keys, values = (torch.randn(2 * block, heads, head_dim).to(exact).to(model_dtype) for _ in range(2))
    block_ids = torch.tensor([3, 1])
    slots = (block_ids[:, None] * block + torch.arange(block)).flatten()
    ops.cpu_attn_reshape_and_cache(keys, values, key_part, value_part, slots, layout.name, 1.0, 1.0, dtype)

    key_part, value_part = split_cpu_cache(as_numbers(cache, dtype))
    stored = PagedCache((layout.keys(key_part),)), PagedCache((layout.values(value_part),))
    wanted = [part.float().transpose(0, 1) for part in (keys, values)]
    for cache_part, expected in zip(stored, wanted, strict=True):
        assert torch.equal(cache_part.gather(block_ids, 2 * block)[0].float(), expected)

    head, source, target = torch.tensor([0, 1, 1]), torch.tensor([5, 0, 63]), torch.tensor([70, 64, 127])
    regions = LiveRegions([LiveRegion([3, 1], 2 * block, block, 0)], block, "cpu")
    fills = torch.full((2, 1, heads, block), -1, dtype=torch.int32)
    fills[0, 0, [0, 1, 1], [0, 0, 1]], fills[1, 0, [0, 1, 1], [0, 0, 1]] = source.int(), target.int()
    kernels.compact(*stored, regions, HoleFills(*fills))
    for cache_part, expected in zip(stored, wanted, strict=True):
        expected = expected.clone()
        expected[head, target] = expected[head, source]
        assert torch.equal(cache_part.gather(block_ids, 2 * block)[0].float(), expected)


def test_a_gpus_cache_reads_what_vllm_stored() -> None:
    """vLLM's Triton kernel stores every kind of fp8 in one dtype there, whatever its name says."""
    heads, block, dim = 2, 16, 32
    # Numbers that the cache holds exactly: Triton's interpreter does not always round to nearest.
    keys, values = (torch.randn(2 * block, heads, dim).to(torch.float8_e4m3fn).float() for _ in range(2))
    with interpreter() as interpret:
        for dtype in ("auto", *FP8):
            stored = torch.uint8 if dtype in FP8 else torch.float32
            cache = interpret(store, keys, values, torch.zeros((3, heads, block, 2 * dim), dtype=stored), dtype)
            layer = SimpleNamespace(kv_cache=cache, kv_cache_dtype=dtype, head_size=dim, layer_name="layer")
            for part, expected in zip(gpu_caches([layer]), (keys, values), strict=True):  # type: ignore[list-item]
                read = part.gather(torch.tensor([0, 1]), 2 * block)[0].float().transpose(0, 1)
                assert torch.equal(read, expected), dtype
