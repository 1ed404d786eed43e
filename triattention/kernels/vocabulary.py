"""What the kernels are told: where keys and values lie, which tokens are live, what the queries are like.

Plain tensors and numbers; needs torch alone, no vLLM and no transformers. `with_torch` and `with_triton` take the same
arguments and return the same results; `triattention.kernels` chooses between them by the cache's device.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain, pairwise

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class PagedCache:
    """Keys, or values, of some layers in paged blocks, wherever and in whatever order their numbers lie.

    `layers`: one view per layer, `[blocks, kv_heads, t1, t2, d1, d2]`; token `t1 * |t2| + t2` of a block has number
    `d1 * |d2| + d2` (as in `triattention.vllm.layout`). All have the same shape, strides, dtype and device. Caches of
    GPU backends are plain: `t2 = d2 = 1`, made by `plain`.
    """

    layers: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        first = self.layers[0]
        assert first.ndim == 6, f"views have {first.ndim} dimensions, expected [blocks, kv_heads, t1, t2, d1, d2]"
        alike = {(v.shape, v.stride(), v.dtype, v.device) for v in self.layers}
        assert len(alike) == 1, f"layers differ in shape, strides, dtype or device: {alike}"

    @classmethod
    def plain(cls, layers: Sequence[Tensor]) -> "PagedCache":
        """From views `[blocks, kv_heads, block_size, head_dim]` of any strides.

        vLLM 0.32 binds one `[blocks, kv_heads, block_size, 2 * head_dim]` per layer, whose strides are the
        `KVCacheLayout`; FlashAttention and Triton attention split keys and values off its last dimension.
        """
        return cls(tuple(layer.unsqueeze(3).unsqueeze(5) for layer in layers))

    @property
    def is_plain(self) -> bool:
        return self.layers[0].shape[3] == self.layers[0].shape[5] == 1

    @property
    def kv_heads(self) -> int:
        return self.layers[0].shape[1]

    @property
    def block_size(self) -> int:
        return self.layers[0].shape[2] * self.layers[0].shape[3]

    @property
    def head_dim(self) -> int:
        return self.layers[0].shape[4] * self.layers[0].shape[5]

    @property
    def dtype(self) -> torch.dtype:
        return self.layers[0].dtype

    @property
    def device(self) -> torch.device:
        return self.layers[0].device

    @cached_property
    def addresses(self) -> Tensor:
        """Where each layer's first number lies, int64 [layers], on the cache's device."""
        return torch.tensor([v.data_ptr() for v in self.layers], device=self.device)

    @cached_property
    def alignment(self) -> int:
        """Bytes, a power of two up to 16, that all addresses are a multiple of."""
        return math.gcd(16, *(v.data_ptr() for v in self.layers))

    @cached_property
    def all_layers(self) -> Tensor | None:
        """One view `[layers, blocks, kv_heads, t1, t2, d1, d2]` where layers lie evenly spaced in one memory."""
        first = self.layers[0]
        steps = {after.data_ptr() - before.data_ptr() for before, after in pairwise(self.layers)} or {0}
        one_memory = len({layer.untyped_storage().data_ptr() for layer in self.layers}) == 1
        step = steps.pop()
        if steps or not one_memory or step < 0 or step % first.element_size():
            return None
        return first.as_strided((len(self.layers), *first.shape), (step // first.element_size(), *first.stride()))

    def read(self, layers: slice, block_ids: Tensor) -> Tensor:
        """All numbers of the blocks, a copy [layers, blocks, kv_heads, t1, t2, d1, d2].

        With all layers in one memory the copy's numbers lie in the cache's own order: turning a layout round costs more
        than the arithmetic on it.
        """
        if self.all_layers is not None:
            return self.all_layers[layers, block_ids]
        return torch.stack([layer[block_ids] for layer in self.layers[layers]])

    def gather(self, block_ids: Tensor, tokens: int) -> Tensor:
        """The first `tokens` tokens of the blocks in all layers: [layers, kv_heads, tokens, head_dim], a copy.

        What policies other than TriAttention score.
        """
        numbers = self.read(slice(None), block_ids).transpose(1, 2)
        shape = (len(self.layers), self.kv_heads, len(block_ids) * self.block_size, self.head_dim)
        return numbers.reshape(shape)[:, :, :tokens]


@dataclass(frozen=True)
class LiveRegion:
    """The live tokens of one request that is about to be compacted."""

    block_ids: Sequence[int]
    """Physical blocks in slot order, from the first dying block to that of the last live token."""
    tokens: int
    """Live tokens. Slot i is token i % block_size of block_ids[i // block_size]."""
    dead_slots: int
    """How many of them, from the front, stand in dying blocks."""
    position: int
    """Tokens processed so far: the position of the next query."""


class LiveRegions:
    """Several requests' live regions, packed one behind the other.

    Two requests of 5 and 2 tokens, block size 4:

        tokens (scores)   0 0 0 0 0 1 1        first_token = 0, 5, 7
        blocks            0 0 1                first_block = 0, 2, 3

    `first_fill` does the same for dying slots: a request has at most that many holes to fill. `requests` holds it all
    on the device, int32 [requests, 5]: first token, tokens, first block, first fill, dead slots.
    """

    def __init__(self, regions: Sequence[LiveRegion], block_size: int, device: torch.device | str) -> None:
        for region in regions:
            assert len(region.block_ids) * block_size >= region.tokens, "fewer blocks than live tokens"
            assert 0 <= region.dead_slots < region.tokens, "a compaction leaves at least one token"
        self.regions = tuple(regions)
        self.block_size = block_size
        self.first_token = list(accumulate((r.tokens for r in regions), initial=0))
        self.first_fill = list(accumulate((r.dead_slots for r in regions), initial=0))
        self.first_block = list(accumulate((len(r.block_ids) for r in regions), initial=0))
        starts = zip(regions, self.first_token, self.first_block, self.first_fill, strict=False)
        table = [(token, r.tokens, block, fill, r.dead_slots) for r, token, block, fill in starts]
        # One copy to the device for both: it is the small copies that cost.
        packed = to_device([*chain(*table), *chain(*(r.block_ids for r in regions))], device)
        cut = 5 * len(regions)
        self.requests, self.block_ids = packed[:cut].view(-1, 5), packed[cut:]

    def __len__(self) -> int:
        return len(self.regions)

    @property
    def tokens(self) -> int:
        return self.first_token[-1]

    @property
    def fills(self) -> int:
        return self.first_fill[-1]

    def token_slice(self, request: int) -> slice:
        """Where the request's tokens stand in packed scores."""
        return slice(self.first_token[request], self.first_token[request + 1])

    def fill_slice(self, request: int) -> slice:
        """Where the request's hole fills stand in packed fills."""
        return slice(self.first_fill[request], self.first_fill[request + 1])

    def blocks_of(self, request: int) -> Tensor:
        """The request's physical blocks, int32, on the device."""
        return self.block_ids[self.first_block[request] : self.first_block[request + 1]]


@dataclass(frozen=True)
class QueryWeights:
    """The calibrated queries, as scoring needs them (see `triattention.scoring` for the formula).

    `mean_real`, `mean_imag`, `spread`: E[q_f] and E|q_f| - |E q_f|, scaled, fp32 [layers, kv_heads, group, bands] on
    the cache's device. `frequencies`: w_f, fp64 [bands], and `offset_mean`: mean over future offsets d of
    exp(i w_f d), complex128 [bands]; both on the CPU. `rotary_dim`, `interleaved`: which two numbers of a head are
    band f (see `triattention.rope`).
    """

    mean_real: Tensor
    mean_imag: Tensor
    spread: Tensor
    frequencies: Tensor
    offset_mean: Tensor
    rotary_dim: int
    interleaved: bool

    @cached_property
    def means(self) -> Tensor:
        """E[q_f], scaled, complex64 [layers, kv_heads, group, bands]."""
        return torch.complex(self.mean_real, self.mean_imag)

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.mean_real.shape[2]

    @property
    def bands(self) -> int:
        return self.mean_real.shape[3]

    def rotations(self, positions: Sequence[int]) -> Tensor:
        """C_f(t), the mean over offsets d of exp(i w_f (t + d)), complex128 [positions, bands].

        exp(i w t) is common to all offsets, so one angle per band is enough. In fp64, reduced modulo 2 pi: w t reaches
        1e5 radians, where fp32 has lost two decimals of the phase.
        """
        times = torch.tensor(positions, dtype=torch.float64)
        phases = torch.remainder(times[:, None] * self.frequencies, 2 * math.pi)
        return torch.polar(torch.ones_like(phases), phases) * self.offset_mean


@dataclass(frozen=True)
class HoleFills:
    """Which survivor is copied into which hole; slots as `LiveRegion` counts them.

    `source`, `target`: int32 [layers, kv_heads, sum of dead slots], or [1, kv_heads, ...] where all layers share a
    head's set. A request's fills stand at the front of its part, the rest is -1: how many there are depends on the
    scores, and asking the GPU would make the CPU wait for it.
    """

    source: Tensor
    target: Tensor

    def bytes_moved(self, keys: PagedCache, values: PagedCache) -> int:
        """Bytes of keys and values that are copied (each read once and written once). Waits for the device."""
        times = len(keys.layers) if self.source.shape[0] == 1 else 1
        row = keys.head_dim * keys.dtype.itemsize + values.head_dim * values.dtype.itemsize
        return int((self.source >= 0).sum()) * times * row


def to_device(numbers: Sequence[int] | np.ndarray, device: torch.device | str) -> Tensor:
    """Integers as int32 on the device, without waiting for it."""
    host = torch.as_tensor(numbers, dtype=torch.int32)
    if torch.device(device).type == "cuda":
        return host.pin_memory().to(device, non_blocking=True)
    return host.to(device)
