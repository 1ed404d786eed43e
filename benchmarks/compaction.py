"""What one compaction moves and costs, and what eviction frees without it: `trifleet bench compaction`, `... eviction`.

Sizes are Qwen3-8B's. Runs where it is started: torch on a CPU, the Triton kernels on a GPU. What it compares with, a
plain copy of as many bytes, runs in between on the same device, so that ratios survive a busy machine.
"""

import math
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import machine
from triattention import kernels
from triattention.kernels import HoleFills, LiveRegion, LiveRegions, PagedCache, QueryWeights
from triattention.scoring import OFFSETS

LAYERS, KV_HEADS, GROUP, HEAD_DIM = 36, 8, 4, 128
BUDGET, INTERVAL, WINDOW, BLOCK_SIZE = 2048, 128, 128, 16
LIVE = BUDGET + INTERVAL
POSITION = 32_768
"""Of the next query: far into a long trace."""

REPEATS = 7
_SAMPLED_TOKENS = 64


def bench_compaction() -> dict[str, Any]:
    """One compaction of one request: bytes, seconds, and the error of fp32 scores.

    `bytes_moved` counts keys and values that are copied once, `bytes_moved_full_slide` those that sliding all survivors
    of the same set to the front would copy. Seconds are medians of `REPEATS`, spreads their interquartile ranges.
    `..._max_relative_error` compares raw scores with the plain mean over 17 offsets in fp64, for every layer and
    query head, relative to the head's largest score; `..._in_deviations` relative to the scores' deviation over the
    tokens, which is what z-scores see.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    about = _machine(device)
    torch.manual_seed(0)
    frequencies = _frequencies()
    slots = torch.arange(POSITION - LIVE, POSITION)
    memory, keys, values, region = _request(_rotated_keys(slots, frequencies, LAYERS), LIVE - BUDGET, device)
    weights = _weights(frequencies, device, LAYERS)
    regions = LiveRegions([region], BLOCK_SIZE, device)

    scores = kernels.score(keys, weights, regions)
    fills = kernels.plan(scores, regions, WINDOW, shared=True)
    score_bytes = LAYERS * KV_HEADS * LIVE * HEAD_DIM * keys.dtype.itemsize
    moved_bytes = fills.bytes_moved(keys, values)
    seconds = _interleaved(
        {
            "score": lambda: kernels.score(keys, weights, regions),
            "copy_of_score_bytes": _copy(score_bytes, device),
            "plan": lambda: kernels.plan(scores, regions, WINDOW, shared=True),
            "compact": lambda: kernels.compact(keys, values, regions, fills),
            "copy_of_moved_bytes": _copy(moved_bytes, device),
        },
        device,
    )
    median = {name: statistics.median(runs) for name, runs in seconds.items()}
    relative, in_deviations = _error_of_collapsed_scores(keys, weights, region, regions, slots)
    full_slide = _rows_of_full_slide(fills, region) * LAYERS * 2 * HEAD_DIM * keys.dtype.itemsize
    return {
        **about,
        "layers": LAYERS,
        "kv_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "dtype": str(keys.dtype).removeprefix("torch."),
        "live": LIVE,
        "budget": BUDGET,
        "block_size": BLOCK_SIZE,
        "cache_bytes": memory.nbytes,
        "bytes_moved": moved_bytes,
        "bytes_moved_full_slide": full_slide,
        "bytes_moved_ratio": full_slide / moved_bytes,
        "score_bytes_read": score_bytes,
        "collapsed_vs_17_offsets_max_relative_error": relative,
        "collapsed_vs_17_offsets_max_error_in_deviations": in_deviations,
        **{f"seconds_{name}": value for name, value in median.items()},
        **{f"spread_{name}": _spread(runs) for name, runs in seconds.items()},
        "score_over_copy": median["score"] / median["copy_of_score_bytes"],
        "compact_over_copy": median["compact"] / median["copy_of_moved_bytes"],
        "repeats": REPEATS,
    }


def bench_eviction(live: int = 4096, evicted: float = 0.9, layers: int = 8) -> dict[str, Any]:
    """Blocks that come free when one request loses `evicted` of its tokens, without compaction and with it.

    TriAttention scores, window of 128, the same kept tokens both times. A block holds every layer and head, so without
    compaction it comes free when none of them keeps any of its tokens: the fewer layers, the sooner. Sets: one for all
    heads and layers (`one_set`, which the engine does not have); `per_head`; `per_layer_per_head`. Keys: independent of
    each other, and drifting along the text (each 0.9 of its predecessor), where good tokens come in runs.
    """
    cpu = torch.device("cpu")
    about = _machine(cpu)
    torch.manual_seed(0)
    frequencies = _frequencies()
    weights = _weights(frequencies, cpu, layers)
    held = live // BLOCK_SIZE
    dead_slots = int(evicted * live) // BLOCK_SIZE * BLOCK_SIZE
    results = {}
    for kind, drift in (("independent", 0.0), ("drifting", 0.9)):
        keys = _rotated_keys(torch.arange(live), frequencies, layers, drift)
        _, cache, _, region = _request(keys, dead_slots, cpu)
        regions = LiveRegions([region], BLOCK_SIZE, cpu)
        scores = kernels.score(cache, weights, regions)
        sets = {
            "one_set": (scores.mean(dim=1, keepdim=True), True),
            "per_head": (scores, True),
            "per_layer_per_head": (scores, False),
        }
        results[kind] = {
            name: _freed(_kept(kernels.plan(ranked, regions, WINDOW, shared), region), dead_slots)
            for name, (ranked, shared) in sets.items()
        }
    return {
        **about,
        "policy": "triattention",
        "layers": layers,
        "kv_heads": KV_HEADS,
        "block_size": BLOCK_SIZE,
        "window": WINDOW,
        "live_tokens": live,
        "evicted_tokens": dead_slots,
        "share_evicted": dead_slots / live,
        "blocks_held": held,
        "keys": results,
    }


def _freed(kept: Tensor, dead_slots: int) -> dict[str, float]:
    """Blocks freed, and their share, for a mask of kept tokens [layers or 1, heads, tokens]."""
    held = kept.shape[-1] // BLOCK_SIZE
    assert (kept.sum(-1) == kept.shape[-1] - dead_slots).all()
    emptied = int((~kept.flatten(0, 1).any(0).view(held, BLOCK_SIZE).any(1)).sum())
    return {
        "blocks_freed_without_compaction": emptied,
        "share_freed_without_compaction": emptied / held,
        "blocks_freed_with_compaction": dead_slots // BLOCK_SIZE,
        "share_freed_with_compaction": dead_slots // BLOCK_SIZE / held,
    }


def _frequencies() -> Tensor:
    """Of Qwen3: theta 1e6, every number rotated."""
    return 1e6 ** (-torch.arange(0, HEAD_DIM, 2, dtype=torch.float64) / HEAD_DIM)


def _weights(frequencies: Tensor, device: torch.device, layers: int) -> QueryWeights:
    """Random queries whose mean is about as large as their spread."""
    phases = torch.tensor(OFFSETS, dtype=torch.float64)[:, None] * frequencies
    shape = (layers, KV_HEADS, GROUP, len(frequencies))
    return QueryWeights(
        mean_real=torch.randn(shape).to(device),
        mean_imag=torch.randn(shape).to(device),
        spread=torch.rand(shape).to(device),
        frequencies=frequencies,
        offset_mean=torch.polar(torch.ones_like(phases), phases).mean(0),
        rotary_dim=HEAD_DIM,
        interleaved=False,
    )


def _rotated_keys(positions: Tensor, frequencies: Tensor, layers: int, drift: float = 0.0) -> Tensor:
    """Keys as they lie in a cache, bf16 [layers, kv_heads, tokens, head_dim]: a head's mean and as much noise.

    `drift`: how much of a token's noise is its predecessor's.
    """
    phases = torch.remainder(positions[:, None] * frequencies, 2 * math.pi)
    turn = torch.polar(torch.ones_like(phases), phases).to(torch.complex64)
    rotated = torch.empty((layers, KV_HEADS, len(positions), HEAD_DIM), dtype=torch.bfloat16)
    for layer in rotated:
        mean = torch.randn(KV_HEADS, 1, HEAD_DIM // 2, dtype=torch.complex64)
        noise = torch.randn(len(positions), KV_HEADS, HEAD_DIM // 2, dtype=torch.complex64)
        if drift:
            fresh = math.sqrt(1 - drift**2)
            for before, token in pairwise(noise):
                token.mul_(fresh).add_(before, alpha=drift)
        bands = (mean + noise.transpose(0, 1)) * turn
        layer[..., : HEAD_DIM // 2] = bands.real
        layer[..., HEAD_DIM // 2 :] = bands.imag
    return rotated


def _request(
    rotated: Tensor, dead_slots: int, device: torch.device
) -> tuple[Tensor, PagedCache, PagedCache, LiveRegion]:
    """The keys, and values, in scattered blocks laid out as vLLM's default (NHD); the memory comes first."""
    layers, kv_heads, tokens, head_dim = rotated.shape
    blocks = tokens // BLOCK_SIZE
    order = torch.randperm(blocks)
    memory = torch.empty((layers, blocks, BLOCK_SIZE, kv_heads, 2 * head_dim), dtype=rotated.dtype, device=device)
    cache = memory.transpose(2, 3)
    for layer in range(layers):
        tokens_of_blocks = rotated[layer].view(kv_heads, blocks, BLOCK_SIZE, head_dim).transpose(0, 1).to(device)
        cache[layer, order.to(device), ..., :head_dim] = tokens_of_blocks
        cache[layer, ..., head_dim:] = 1 + layer
    region = LiveRegion(order.tolist(), tokens, dead_slots, POSITION)
    keys = PagedCache.plain([layer[..., :head_dim] for layer in cache])
    values = PagedCache.plain([layer[..., head_dim:] for layer in cache])
    return memory, keys, values, region


def _kept(fills: HoleFills, region: LiveRegion) -> Tensor:
    """Mask of the kept tokens that fills stand for, bool [layers or 1, kv_heads, tokens]."""
    kept = torch.zeros((*fills.source.shape[:2], region.tokens + 1), dtype=torch.bool)
    kept[..., region.dead_slots : region.tokens] = True
    # -1 is the spare last column.
    kept.scatter_(-1, fills.source.cpu().long() % (region.tokens + 1), True)
    kept.scatter_(-1, fills.target.cpu().long() % (region.tokens + 1), False)
    return kept[..., : region.tokens]


def _rows_of_full_slide(fills: HoleFills, region: LiveRegion) -> int:
    """How many tokens of how many heads move in one layer if all survivors slide to the front, in order."""
    kept = _kept(fills, region)[0]
    rank = kept.cumsum(-1) - 1
    return int((kept & (rank != torch.arange(region.tokens))).sum())


def _error_of_collapsed_scores(
    keys: PagedCache, weights: QueryWeights, region: LiveRegion, regions: LiveRegions, positions: Tensor
) -> tuple[float, float]:
    """Largest error of raw scores over all layers and query heads, at evenly spaced tokens."""
    sampled = torch.linspace(0, region.tokens - 1, _SAMPLED_TOKENS).long()
    distances = region.position - positions[sampled].double()
    block_ids = torch.tensor(region.block_ids, device=keys.device)
    cached = keys.gather(block_ids, region.tokens)[:, :, sampled.to(keys.device)].cpu().double()
    k = torch.complex(cached[..., : HEAD_DIM // 2], cached[..., HEAD_DIM // 2 :])
    # The key before RoPE, from the rounded one in the cache.
    k = k * torch.polar(torch.ones(()).double(), -positions[sampled].double()[:, None] * weights.frequencies)
    worst_relative = worst_in_deviations = 0.0
    for layer in range(LAYERS):
        query = torch.complex(weights.mean_real[layer].double(), weights.mean_imag[layer].double()).cpu()[:, :, None]
        norm = (weights.spread[layer].double().cpu()[:, :, None] * k[layer, :, None].abs()).sum(-1)
        phase = query.angle() - k[layer, :, None].angle()
        weight = query.abs() * k[layer, :, None].abs()
        expected = torch.zeros_like(norm)
        for offset in OFFSETS:
            turn = (distances + offset)[:, None] * weights.frequencies
            expected += ((weight * torch.cos(turn + phase)).sum(-1) + norm) / len(OFFSETS)
        actual = kernels.raw_scores(keys, weights, regions, range(layer, layer + 1))[0].cpu().double()
        error = (actual[..., sampled] - expected).abs().amax(-1)
        worst_relative = max(worst_relative, float((error / expected.abs().amax(-1)).max()))
        worst_in_deviations = max(worst_in_deviations, float((error / actual.std(-1)).max()))
    return worst_relative, worst_in_deviations


def _copy(size: int, device: torch.device) -> Callable[[], object]:
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)


def _interleaved(runs: dict[str, Callable[[], object]], device: torch.device) -> dict[str, list[float]]:
    """Seconds of every run, `REPEATS` times in turn after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(REPEATS + 1):
        for name, run in runs.items():
            _wait(device)
            started = time.perf_counter()
            run()
            _wait(device)
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _spread(seconds: list[float]) -> float:
    low, _, high = statistics.quantiles(seconds, n=4)
    return high - low


def _machine(device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name() if device.type == "cuda" else "a CPU"
    return machine("torch", "triton") | {"device": name, "threads": torch.get_num_threads()}
