"""Where a token's key and value stand inside a KV block, per attention backend and kernel set.

Every known layout is a strided view `[blocks, kv_heads, t1, t2, d1, d2]` on the layer's cache, where token
`t1 * |t2| + t2` of the block has dimension `d1 * |d2| + d2`. The layout of a running engine is detected by writing
known keys and values with vLLM's own kernel and reading them back; one that no view explains is refused.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from vllm.model_executor.layers.attention import Attention

View = Callable[[torch.Tensor], torch.Tensor]
"""[blocks, kv_heads, block_size, head_dim] storage -> [blocks, kv_heads, t1, t2, d1, d2] view."""


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


class PagedTokens:
    """Token-wise access to one half (keys or values) of one layer's paged cache."""

    def __init__(self, view: torch.Tensor) -> None:
        self.view = view

    def gather(self, block_ids: torch.Tensor) -> torch.Tensor:
        """All tokens of the blocks [n], in slot order: [kv_heads, n * block_size, head_dim]."""
        blocks = self.view[block_ids]
        n, heads, t1, t2, d1, d2 = blocks.shape
        return blocks.transpose(0, 1).reshape(heads, n * t1 * t2, d1 * d2)

    def copy(self, block_ids: torch.Tensor, head: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy slot `source` to slot `target` of KV head `head`, row by row; slots count from block_ids[0].

        The sets of sources and targets are disjoint, so one gather and one scatter do it.
        """
        t2 = self.view.shape[3]
        size = self.view.shape[2] * t2

        def index(slot: torch.Tensor) -> tuple[torch.Tensor, ...]:
            offset = slot % size
            return block_ids[slot // size], head, offset // t2, offset % t2

        self.view[index(target)] = self.view[index(source)]


def split_cpu_cache(cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The CPU backend's tensor [blocks, kv_heads, block_size, 2 * head_dim] as its key and value storage.

    Same split as `CPUAttentionBackendImpl.forward`: both [blocks, kv_heads, block_size, head_dim], keys first.
    """
    blocks, heads, size, _ = cache.shape
    keys, values = cache.view(blocks, heads, size * 2, -1).chunk(2, dim=2)
    return keys, values


def detect_layout(layer: Attention, cache: torch.Tensor) -> Layout:
    """The layout in which vLLM's kernel stores this layer's keys and values.

    `cache` gives shape and dtype only. Raises ValueError where no known layout explains what the kernel wrote.
    """
    _, heads, size, double = cache.shape
    dim = double // 2
    probe = torch.zeros((2, heads, size, double), dtype=cache.dtype)
    # Distinct small integers per token and dimension: exact in bf16, and no permutation of them is the same.
    token = torch.arange(size).view(size, 1, 1)
    head = torch.arange(heads).view(1, heads, 1)
    keys = ((token * 7 + head * 3 + torch.arange(dim) * 5) % 251).to(cache.dtype)
    values = ((token * 5 + head * 11 + torch.arange(dim) * 13) % 241).to(cache.dtype)
    layer.impl.do_kv_cache_update(layer, keys, values, probe, torch.arange(size, 2 * size))
    block = torch.tensor([1])
    key_part, value_part = split_cpu_cache(probe)
    for layout in CPU_LAYOUTS:
        found_keys = PagedTokens(layout.keys(key_part)).gather(block)
        found_values = PagedTokens(layout.values(value_part)).gather(block)
        if torch.equal(found_keys, keys.transpose(0, 1)) and torch.equal(found_values, values.transpose(0, 1)):
            return layout
    raise ValueError(
        f"KV compression does not know the KV-cache layout of {type(layer.impl).__name__} (block size {size}, "
        f"head size {dim}, {cache.dtype}): use a model or block size that stores keys as one of "
        f"{', '.join(layout.name for layout in CPU_LAYOUTS)}."
    )
