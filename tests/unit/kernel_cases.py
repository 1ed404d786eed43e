"""Caches, requests and query statistics for the kernels' tests, and the score word for word in fp64."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch

from triattention.kernels import LiveRegion, LiveRegions, PagedCache, QueryWeights

OFFSETS = [2**i for i in range(17)]


@dataclass(frozen=True)
class Case:
    """Keys and values are two halves of `memory`, as in vLLM; NaN stands wherever no live token does."""

    memory: torch.Tensor
    keys: PagedCache
    values: PagedCache
    weights: QueryWeights
    regions: LiveRegions


def make_case(
    dtype: torch.dtype = torch.bfloat16,
    head_dim: int = 128,
    group: int = 4,
    *,
    layers: int = 2,
    kv_heads: int = 2,
    block_size: int = 16,
    tokens: Sequence[int] = (40,),
    dead_slots: Sequence[int] | None = None,
    position: int = 131_072,
    layout: str = "NHD",
    rotary_dim: int | None = None,
    interleaved: bool = False,
    seed: int = 0,
) -> Case:
    generator = torch.Generator().manual_seed(seed)
    blocks = [-(-n // block_size) for n in tokens]
    total = sum(blocks) + 3
    shape = {
        "NHD": (layers, total, block_size, kv_heads, 2 * head_dim),
        "HND": (layers, total, kv_heads, block_size, 2 * head_dim),
        "blocks first": (total, layers, kv_heads, block_size, 2 * head_dim),
    }[layout]
    to_logical = {"NHD": (0, 1, 3, 2, 4), "HND": (0, 1, 2, 3, 4), "blocks first": (1, 0, 2, 3, 4)}[layout]
    memory = torch.full(shape, torch.nan).to(dtype)
    logical = memory.permute(to_logical)  # [layers, blocks, kv_heads, block_size, 2 * head_dim]

    order = torch.randperm(total, generator=generator).tolist()
    regions = []
    for request, count in enumerate(tokens):
        ids = [order.pop() for _ in range(blocks[request])]
        for slot in range(count):
            row = torch.randn(layers, kv_heads, 2 * head_dim, generator=generator).to(dtype)
            logical[:, ids[slot // block_size], :, slot % block_size] = row
        dead = dead_slots[request] if dead_slots else 0
        regions.append(LiveRegion(ids, count, dead, position - 17 * request))

    rotary_dim = rotary_dim or head_dim
    bands = head_dim // 2
    frequencies = torch.zeros(bands, dtype=torch.float64)
    frequencies[: rotary_dim // 2] = 1e4 ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    phases = torch.tensor(OFFSETS, dtype=torch.float64)[:, None] * frequencies
    draw = (layers, kv_heads, group, bands)
    weights = QueryWeights(
        mean_real=torch.randn(draw, generator=generator),
        mean_imag=torch.randn(draw, generator=generator),
        spread=torch.rand(draw, generator=generator),
        frequencies=frequencies,
        offset_mean=torch.polar(torch.ones_like(phases), phases).mean(0),
        rotary_dim=rotary_dim,
        interleaved=interleaved,
    )
    return Case(
        memory,
        PagedCache.plain([layer[..., :head_dim] for layer in logical]),
        PagedCache.plain([layer[..., head_dim:] for layer in logical]),
        weights,
        LiveRegions(regions, block_size, "cpu"),
    )


def band_numbers(weights: QueryWeights, head_dim: int) -> tuple[list[int], list[int]]:
    """Which number of a head is each band's real part, and which its imaginary part."""
    if weights.interleaved:
        return list(range(0, head_dim, 2)), list(range(1, head_dim, 2))
    half, tail = weights.rotary_dim // 2, (head_dim - weights.rotary_dim) // 2
    front = weights.rotary_dim
    real = [*range(half), *range(front, front + tail)]
    return real, [*range(half, front), *range(front + tail, head_dim)]


def raw_scores_fp64(case: Case, request: int) -> torch.Tensor:
    """Sum over bands and mean over 17 offsets, one by one, fp64 [layers, kv_heads, group, tokens]."""
    weights, region = case.weights, case.regions.regions[request]
    real, imag = band_numbers(weights, case.keys.head_dim)
    ids = torch.tensor(region.block_ids)
    keys = case.keys.gather(ids, region.tokens)
    k = torch.complex(keys.double()[..., real], keys.double()[..., imag])[:, :, None]
    query = torch.complex(weights.mean_real.double(), weights.mean_imag.double())[:, :, :, None]
    norm = (weights.spread.double()[:, :, :, None] * k.abs()).sum(-1)
    total = torch.zeros_like(norm)
    for offset in OFFSETS:
        angle = weights.frequencies * (region.position + offset) + query.angle() - k.angle()
        total += (query.abs() * k.abs() * torch.cos(angle)).sum(-1) + norm
    return total / len(OFFSETS)


def scores_fp64(case: Case, request: int) -> torch.Tensor:
    """z-scores over the tokens, then the group's maximum: fp64 [layers, kv_heads, tokens]."""
    raw = raw_scores_fp64(case, request)
    if raw.shape[-1] == 1:
        return torch.zeros_like(raw).amax(2)
    return ((raw - raw.mean(-1, keepdim=True)) / raw.std(-1, keepdim=True, correction=0)).amax(2)


def worst_score_error(case: Case, scores: torch.Tensor) -> float:
    """Largest distance from fp64, in deviations; infinite if a score is missing."""
    assert scores.shape == (len(case.keys.layers), case.keys.kv_heads, case.regions.tokens)
    if not scores.isfinite().all():
        return float("inf")
    return max(
        float((scores[..., case.regions.token_slice(r)].double() - scores_fp64(case, r)).abs().max())
        for r in range(len(case.regions))
    )


@contextmanager
def poisoned_outputs() -> Iterator[None]:
    """Within, torch.empty and empty_like return NaN, or the largest integer: what is not written shows."""

    def poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def allocate_poisoned(*arguments: Any, **keywords: Any) -> torch.Tensor:
            made = allocate(*arguments, **keywords)
            return made.fill_(torch.nan if made.is_floating_point() else torch.iinfo(made.dtype).max)

        return allocate_poisoned

    with patch.multiple(torch, empty=poisoned(torch.empty), empty_like=poisoned(torch.empty_like)):
        yield
