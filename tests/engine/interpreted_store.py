"""vLLM's own Triton kernel that writes keys and values into a GPU's cache, interpreted on the CPU.

Called in the child of `tests.unit.interpreted`: vLLM decides on import whether there is Triton.
"""

from types import SimpleNamespace

import torch
from triton.backends import backends


class FakeActiveDriver:
    @staticmethod
    def is_active() -> bool:
        return True


def store(keys: torch.Tensor, values: torch.Tensor, cache: torch.Tensor, kv_cache_dtype: str) -> torch.Tensor:
    """Keys and values [tokens, kv_heads, head_dim] into the first slots of `cache`, as `TritonAttentionImpl` does."""
    backends["cpu"] = SimpleNamespace(driver=FakeActiveDriver)
    torch.cuda.get_device_capability = lambda *_: (9, 0)

    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.attention.ops.triton_reshape_and_cache_flash import triton_reshape_and_cache_flash

    CpuPlatform.has_device_capability = classmethod(lambda *_: True)
    key_cache, value_cache = cache.transpose(1, 2).split(keys.shape[-1], dim=-1)
    scale = torch.ones(())
    slots = torch.arange(len(keys))
    triton_reshape_and_cache_flash(keys, values, key_cache, value_cache, slots, kv_cache_dtype, scale, scale)
    return cache
