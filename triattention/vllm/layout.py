"""Where a token's key and value stand inside a KV block, per attention backend and kernel set.

Every known layout is a strided view `[blocks, kv_heads, t1, t2, d1, d2]` on the layer's cache, where token
`t1 * |t2| + t2` of the block has dimension `d1 * |d2| + d2` (`PagedCache`). GPU backends store plain rows. The CPU
backend's layout depends on its kernel set: it is detected by writing known keys and values with vLLM's own kernel and
reading them back, and one that no view explains is refused.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from vllm.model_executor.layers.attention import Attention
from vllm.platforms import current_platform

from triattention.kernels import PagedCache

View = Callable[[torch.Tensor], torch.Tensor]
"""[blocks, kv_heads, block_size, head_dim] storage -> [blocks, kv_heads, t1, t2, d1, d2] view."""

FP8 = {"fp8": torch.float8_e4m3fn, "fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
"""What the bytes of a CPU's quantised cache are. Scales are one number per layer or head: they cancel in z-scores."""

_DIGIT = 8
"""A probe writes numbers in base 8: 0 to 7 are exact in every float dtype, fp8 included."""


def _plain(part: torch.Tensor) -> torch.Tensor:
    blocks, heads, size, dim = part.shape
    return part.view(blocks, heads, size, 1, dim, 1)


def _transposed(part: torch.Tensor) -> torch.Tensor:
    """`vec` and `vec16` keys: [head_dim, block_size]."""
    blocks, heads, size, dim = part.shape
    return part.view(blocks, heads, dim, 1, size, 1).permute(0, 1, 4, 5, 2, 3)


def _amx_keys(part: torch.Tensor) -> torch.Tensor:
    """bf16 pairs along head_dim for the tile unit: [block_size / 16, head_dim / 2, 16, 2]."""
    blocks, heads, size, dim = part.shape
    return part.view(blocks, heads, size // 16, dim // 2, 16, 2).permute(0, 1, 2, 4, 3, 5)


def _amx_values(part: torch.Tensor) -> torch.Tensor:
    """bf16 pairs along the tokens: [head_dim / 16, block_size / 2, 16, 2]."""
    blocks, heads, size, dim = part.shape
    return part.view(blocks, heads, dim // 16, size // 2, 16, 2).permute(0, 1, 3, 5, 2, 4)


@dataclass(frozen=True)
class Layout:
    name: str
    keys: View
    values: View


CPU_LAYOUTS = (Layout("vec", _transposed, _plain), Layout("amx", _amx_keys, _amx_values))


def cpu_caches(layers: Sequence[Attention]) -> tuple[PagedCache, PagedCache]:
    """Keys and values of layers of the CPU backend. Raises ValueError where their layout is unknown."""
    keys, values = [], []
    for layer in layers:
        cache = as_numbers(layer.kv_cache, layer.kv_cache_dtype)
        layout = detect_layout(layer, cache)
        key_part, value_part = split_cpu_cache(cache)
        keys.append(layout.keys(key_part))
        values.append(layout.values(value_part))
    return PagedCache(tuple(keys)), PagedCache(tuple(values))


def gpu_caches(layers: Sequence[Attention]) -> tuple[PagedCache, PagedCache]:
    """Keys and values of layers of the FlashAttention and Triton backends: halves of the last dimension.

    Both split `[blocks, kv_heads, block_size, 2 * head_dim]` so, whatever `KVCacheLayout` its strides follow, and store
    every kind of fp8 in the platform's own, fp8_e5m2 too.
    """
    fp8 = current_platform.fp8_dtype()
    caches = [layer.kv_cache.view(fp8) if layer.kv_cache_dtype in FP8 else layer.kv_cache for layer in layers]
    for layer, cache in zip(layers, caches, strict=True):
        if cache.shape[-1] != 2 * layer.head_size:
            raise ValueError(
                f"KV compression does not know the KV-cache layout of {layer.layer_name}: a token takes "
                f"{cache.shape[-1]} numbers, not twice its head size {layer.head_size}; use kv_cache_dtype auto or fp8."
            )
    keys = [cache[..., : layer.head_size] for layer, cache in zip(layers, caches, strict=True)]
    values = [cache[..., layer.head_size :] for layer, cache in zip(layers, caches, strict=True)]
    return PagedCache.plain(keys), PagedCache.plain(values)


def as_numbers(cache: torch.Tensor, kv_cache_dtype: str) -> torch.Tensor:
    """A CPU's cache: vLLM holds fp8 as bytes."""
    return cache.view(FP8[kv_cache_dtype]) if kv_cache_dtype in FP8 else cache


def split_cpu_cache(cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The CPU backend's tensor [blocks, kv_heads, block_size, 2 * head_dim] as its key and value storage.

    Same split as `CPUAttentionBackendImpl.forward`: both [blocks, kv_heads, block_size, head_dim], keys first.
    """
    blocks, heads, size, _ = cache.shape
    keys, values = cache.view(blocks, heads, size * 2, -1).chunk(2, dim=2)
    return keys, values


def detect_layout(layer: Attention, cache: torch.Tensor) -> Layout:
    """The layout in which vLLM's kernel stores this layer's keys and values.

    `cache` gives shape and dtype only: the layer's own, or what `as_numbers` reads its bytes as. Every number of a
    block gets a name of its own, written digit by digit. Raises ValueError where no known layout explains all of them.
    """
    stored = layer.kv_cache.dtype
    assert cache.dtype.itemsize == stored.itemsize, f"{cache.dtype} cannot name the numbers of a cache of {stored}"
    _, heads, size, double = cache.shape
    dim = double // 2
    names = torch.arange(2 * size * heads * dim).view(2, size, heads, dim)
    layouts = list(CPU_LAYOUTS)
    while names.any():
        keys, values = (names % _DIGIT).to(layer.dtype)
        probe = torch.zeros((2, heads, size, double), dtype=cache.dtype)
        layer.impl.do_kv_cache_update(
            layer,
            # A quantised cache holds numbers divided by the layer's scales.
            keys * (layer._k_scale_float if layer.kv_cache_dtype in FP8 else 1),
            values * (layer._v_scale_float if layer.kv_cache_dtype in FP8 else 1),
            probe.view(stored),
            torch.arange(size, 2 * size),
        )
        key_part, value_part = split_cpu_cache(probe)
        layouts = [
            layout
            for layout in layouts
            if _reads(layout.keys(key_part), keys) and _reads(layout.values(value_part), values)
        ]
        names //= _DIGIT
    if layouts:
        return layouts[0]
    raise ValueError(
        f"KV compression does not know the KV-cache layout of {type(layer.impl).__name__} (block size {size}, "
        f"head size {dim}, {cache.dtype}): use a model or block size that stores keys as one of "
        f"{', '.join(layout.name for layout in CPU_LAYOUTS)}."
    )


def _reads(view: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether block 1 of the view holds `expected` [block_size, heads, head_dim]."""
    stored = PagedCache((view,)).gather(torch.tensor([1]), len(expected))[0]
    return torch.equal(stored.to(expected.dtype), expected.transpose(0, 1))
