"""Checks the Triton kernels on a GPU against fp64 and measures them against a copy on the same GPU.

    python benchmarks/gpu/kernels.py [--json PATH] [--quick]

Builds nothing and needs torch, numpy, triton and this repository's triattention/kernels, nothing else. Exits with 1 if
a check fails. Sizes are Qwen3-8B's; a few minutes and 32 GB of free GPU memory, with --quick 16 GB. What the checks
found is written before anything is measured.

How it measures: every run works on the next of several caches, so that none finds its bytes in the L2 cache from the
run before; the GPU is kept busy while the CPU prepares a launch, so that events see the GPU's time alone; the kernels
and the copies they are compared with take turns. What the CPU needs to launch them is a column of its own.
"""

import argparse
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from triattention.kernels import LiveRegion, LiveRegions, PagedCache, QueryWeights, with_torch, with_triton
from triattention.kernels.with_triton import Tiling

LAYERS, KV_HEADS, GROUP, HEAD_DIM = 36, 8, 4, 128
WEIGHT_BYTES = 16.4e9
"""Of Qwen3-8B in bf16: what a decode step reads beside the KV cache."""
BLOCK_SIZE, INTERVAL, WINDOW = 16, 128, 128
LARGE_COPY = 4 << 30
"""Bytes of the copy whose bandwidth the others are compared with."""
OFFSETS = [2**i for i in range(17)]
TILINGS = [
    Tiling(tile, tiles, stages, warps)
    for tile, warps in ((64, 4), (128, 4), (128, 8))
    for tiles in (2, 4, 8)
    for stages in (3, 5, 7)
]


# Caches and requests ---------------------------------------------------------------------------------------------


def make_cache(
    layers: int, blocks: int, kv_heads: int, head_dim: int, dtype: torch.dtype, layout: str, device: str
) -> tuple[Tensor, PagedCache, PagedCache]:
    """vLLM's cache in one of its layouts, random; the memory comes first."""
    shape, order = {
        "NHD": ((layers, blocks, BLOCK_SIZE, kv_heads, 2 * head_dim), (0, 1, 3, 2, 4)),
        "HND": ((layers, blocks, kv_heads, BLOCK_SIZE, 2 * head_dim), (0, 1, 2, 3, 4)),
        "blocks first": ((blocks, layers, kv_heads, BLOCK_SIZE, 2 * head_dim), (1, 0, 2, 3, 4)),
    }[layout]
    memory = torch.empty(shape, dtype=dtype, device=device)
    for part in memory:
        part.copy_(torch.randn(shape[1:], device=device))
    views = memory.permute(order)
    keys = PagedCache.plain([view[..., :head_dim] for view in views])
    return memory, keys, PagedCache.plain([view[..., head_dim:] for view in views])


def make_weights(
    layers: int, kv_heads: int, group: int, head_dim: int, device: str, rotary_dim: int, interleaved: bool
) -> QueryWeights:
    bands = head_dim // 2
    frequencies = torch.zeros(bands, dtype=torch.float64)
    frequencies[: rotary_dim // 2] = 1e6 ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    phases = torch.tensor(OFFSETS, dtype=torch.float64)[:, None] * frequencies
    shape = (layers, kv_heads, group, bands)
    return QueryWeights(
        mean_real=torch.randn(shape, device=device),
        mean_imag=torch.randn(shape, device=device),
        spread=torch.rand(shape, device=device),
        frequencies=frequencies,
        offset_mean=torch.polar(torch.ones_like(phases), phases).mean(0),
        rotary_dim=rotary_dim,
        interleaved=interleaved,
    )


def make_regions(tokens: list[int], dead_slots: list[int], blocks: int, position: int, device: str) -> LiveRegions:
    """Requests in scattered blocks."""
    order = torch.randperm(blocks).tolist()
    regions: list[LiveRegion] = []
    for count, dead in zip(tokens, dead_slots, strict=True):
        ids = [order.pop() for _ in range(-(-count // BLOCK_SIZE))]
        regions.append(LiveRegion(ids, count, dead, position - 17 * len(regions)))
    return LiveRegions(regions, BLOCK_SIZE, device)


# Checks ----------------------------------------------------------------------------------------------------------


def band_numbers(weights: QueryWeights, head_dim: int) -> tuple[list[int], list[int]]:
    """Which number of a head is each band's real part, and which its imaginary part."""
    if weights.interleaved:
        return list(range(0, head_dim, 2)), list(range(1, head_dim, 2))
    half, front = weights.rotary_dim // 2, weights.rotary_dim
    tail = (head_dim - front) // 2
    return [*range(half), *range(front, front + tail)], [*range(half, front), *range(front + tail, head_dim)]


def scores_fp64(keys: PagedCache, weights: QueryWeights, region: LiveRegion) -> Tensor:
    """The plain mean over 17 offsets, z-scores, the group's maximum: fp64 [layers, kv_heads, tokens]."""
    device = keys.device
    real, imag = band_numbers(weights, keys.head_dim)
    cached = keys.gather(torch.tensor(region.block_ids, device=device), region.tokens).double()
    k = torch.complex(cached[..., real], cached[..., imag])[:, :, None]
    query = torch.complex(weights.mean_real.double(), weights.mean_imag.double())[:, :, :, None]
    norm = (weights.spread.double()[:, :, :, None] * k.abs()).sum(-1)
    raw = torch.zeros_like(norm)
    for offset in OFFSETS:
        angle = weights.frequencies.to(device) * (region.position + offset) + query.angle() - k.angle()
        raw += ((query.abs() * k.abs() * torch.cos(angle)).sum(-1) + norm) / len(OFFSETS)
    if region.tokens == 1:
        return torch.zeros_like(raw).amax(2)
    return ((raw - raw.mean(-1, keepdim=True)) / raw.std(-1, keepdim=True, correction=0)).amax(2)


def poisoned_outputs() -> Any:
    """Within, torch.empty and empty_like return NaN, or the largest integer: what is not written shows."""

    def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate_poisoned(*arguments: Any, **keywords: Any) -> Tensor:
            made = allocate(*arguments, **keywords)
            return made.fill_(torch.nan if made.is_floating_point() else torch.iinfo(made.dtype).max)

        return allocate_poisoned

    return patch.multiple(torch, empty=poisoned(torch.empty), empty_like=poisoned(torch.empty_like))


def check(
    device: str,
    dtype: torch.dtype = torch.bfloat16,
    head_dim: int = 128,
    group: int = 4,
    layout: str = "NHD",
    tokens: tuple[int, ...] = (1, 2176, 33, 700),
    rotary_dim: int | None = None,
    interleaved: bool = False,
    tiling: Tiling = with_triton.TILING,
) -> dict[str, Any]:
    """One launch of every kernel: scores against fp64, plan and compaction against the torch path, bit for bit."""
    dead = [min(128, (count - 1) // BLOCK_SIZE * BLOCK_SIZE) for count in tokens]
    blocks = sum(-(-count // BLOCK_SIZE) for count in tokens) + 9
    memory, keys, values = make_cache(2, blocks, 2, head_dim, dtype, layout, device)
    weights = make_weights(2, 2, group, head_dim, device, rotary_dim or head_dim, interleaved)
    regions = make_regions(list(tokens), dead, blocks, 131_072, device)
    with poisoned_outputs():
        scores = with_triton.score(keys, weights, regions, tiling)
    worst = 0.0
    for request, region in enumerate(regions.regions):
        error = (scores[..., regions.token_slice(request)].double() - scores_fp64(keys, weights, region)).abs().max()
        worst = max(worst, float(error.nan_to_num(nan=math.inf)))

    rounded = (4 * scores).round() / 4  # many ties
    same = True
    for shared in (True, False):
        with poisoned_outputs():
            fills = with_triton.plan(rounded, regions, 1, shared)
            expected = with_torch.plan(rounded, regions, 1, shared)
        same &= torch.equal(fills.source, expected.source) and torch.equal(fills.target, expected.target)
        integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[memory.element_size()]
        before = memory.view(integers).clone()
        with_triton.compact(keys, values, regions, expected)
        after = memory.view(integers).clone()
        memory.view(integers).copy_(before)
        with_torch.compact(keys, values, regions, expected)
        same &= torch.equal(memory.view(integers), after)
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "head_dim": head_dim,
        "group": group,
        "layout": layout,
        "tokens": tokens,
        "rotary_dim": rotary_dim or head_dim,
        "interleaved": interleaved,
        "tiling": asdict(tiling),
        "worst_score_error": worst,
        "plan_and_compaction_exact": same,
        "passed": worst < 1e-4 and same,
    }


def squeeze_is_exact(device: str) -> bool:
    """Block tables of 40 rows of up to 131,072 tokens, some compacted: Triton against the torch path."""
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 131_073, (40,), generator=draw, dtype=torch.int32)
    table = torch.randint(1, 1 << 20, (40, 131_072 // BLOCK_SIZE), generator=draw, dtype=torch.int32)
    used = -(-lengths // BLOCK_SIZE)
    for row in range(0, 40, 2):
        first, last = sorted(int(torch.rand((), generator=draw) * used[row]) for _ in range(2))
        table[row, first:last] = 0
    outputs = []
    for squeeze, where in ((with_triton.squeeze, device), (with_torch.squeeze, "cpu")):
        there, live = table.to(where), lengths.to(where)
        with poisoned_outputs():
            squeezed, live_lengths = torch.empty_like(there), torch.empty_like(live)
        squeeze(there, live, BLOCK_SIZE, squeezed, live_lengths)
        kept = -(-live_lengths.cpu() // BLOCK_SIZE)
        readable = torch.arange(table.shape[1]) < kept[:, None]
        outputs.append((squeezed.cpu().masked_fill(~readable, 0), live_lengths.cpu()))
    return all(torch.equal(one, other) for one, other in zip(*outputs, strict=True))


def checks(device: str) -> list[dict[str, Any]]:
    cases: list[dict[str, Any]] = [
        {"dtype": dtype, "head_dim": head_dim, "group": group}
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
        for head_dim in (64, 80, 96, 128, 256)
        for group in (1, 2, 4, 8)
    ]
    cases += [{"layout": layout} for layout in ("HND", "blocks first")]
    cases += [
        {"dtype": torch.float8_e4m3fn},
        {"dtype": torch.float8_e5m2},
        {"tokens": (1,)},
        {"tokens": (20_000, 5, 4097)},
    ]
    cases += [{"rotary_dim": 64}, {"rotary_dim": 52}, {"interleaved": True}, {"rotary_dim": 64, "interleaved": True}]
    cases += [{"tiling": tiling} for tiling in TILINGS]
    results = [check(device, **case) for case in cases]
    return [*results, {"kernel": "squeeze", "passed": squeeze_is_exact(device)}]


# Measurements ----------------------------------------------------------------------------------------------------


def gpu_seconds(runs: dict[str, Callable[[int], object]], repeats: int) -> dict[str, list[float]]:
    """The GPU's seconds of every run, in turn; run number i is told i. Three rounds do not count."""
    events: dict[str, list[Any]] = {name: [] for name in runs}
    for turn in range(repeats + 3):
        for name, run in runs.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(8_000_000)  # about 4 ms: the launch is queued before the GPU comes to it
            start.record()
            run(turn)
            end.record()
            torch.cuda.synchronize()
            if turn >= 3:
                events[name].append((start, end))
    return {name: [start.elapsed_time(end) / 1e3 for start, end in pairs] for name, pairs in events.items()}


def cpu_seconds(run: Callable[[int], object], repeats: int) -> float:
    """Median seconds until the call returns, the GPU idle before."""
    seconds = []
    for turn in range(repeats):
        torch.cuda.synchronize()
        started = time.perf_counter()
        run(turn)
        seconds.append(time.perf_counter() - started)
    torch.cuda.synchronize()
    return statistics.median(seconds)


def copy_of(size: int, scratch: Tensor) -> Callable[[int], object]:
    """A copy of `size` bytes from one half of `scratch` to the other, at another place each time.

    More than a half holds is copied in pieces, so that the largest copies need no memory of their size.
    """
    source, target = scratch.chunk(2)
    step = -(-size // 512) * 512  # aligned, as whole buffers are
    places = max(1, len(source) // step)

    def copy(turn: int) -> None:
        start, left = turn % places * step, size
        while left > 0:
            piece = slice(start, start + min(left, len(source)))
            target[piece].copy_(source[piece])
            left -= len(source)

    return copy


def make_steps(requests: int, live: int) -> tuple[PagedCache, PagedCache, QueryWeights, list[LiveRegions]]:
    """Keys and values of Qwen3-8B's shape, and several steps, each of which compacts `requests` requests of its own."""
    steps, blocks = max(1, 8 // requests), -(-live // BLOCK_SIZE)
    total = steps * requests * blocks
    _, keys, values = make_cache(LAYERS, total, KV_HEADS, HEAD_DIM, torch.bfloat16, "NHD", "cuda")
    weights = make_weights(LAYERS, KV_HEADS, GROUP, HEAD_DIM, "cuda", HEAD_DIM, False)
    batches = [
        LiveRegions([LiveRegion(ids.tolist(), live, INTERVAL, 30_000) for ids in chosen], BLOCK_SIZE, "cuda")
        for chosen in torch.randperm(total).view(steps, requests, blocks)
    ]
    return keys, values, weights, batches


def measure(requests: int, budget: int, repeats: int) -> dict[str, Any]:
    """One step that compacts `requests` requests of `budget` + 128 live tokens each."""
    live = budget + INTERVAL
    keys, values, weights, batches = make_steps(requests, live)
    steps = len(batches)
    scores = [with_triton.score(keys, weights, batch) for batch in batches]
    fills = [with_triton.plan(s, batch, WINDOW, True) for s, batch in zip(scores, batches, strict=True)]
    key_bytes = requests * live * LAYERS * KV_HEADS * HEAD_DIM * 2
    moved = statistics.mean(fill.bytes_moved(keys, values) for fill in fills)

    def raw(turn: int) -> object:
        return with_triton.raw_scores(keys, weights, batches[turn % steps], range(LAYERS))

    def score(turn: int) -> object:
        return with_triton.score(keys, weights, batches[turn % steps])

    def plan(turn: int) -> object:
        return with_triton.plan(scores[turn % steps], batches[turn % steps], WINDOW, True)

    def plan_per_layer(turn: int) -> object:
        return with_triton.plan(scores[turn % steps], batches[turn % steps], WINDOW, False)

    def compact(turn: int) -> None:
        with_triton.compact(keys, values, batches[turn % steps], fills[turn % steps])

    scratch = torch.ones(2 * LARGE_COPY, dtype=torch.uint8, device="cuda")
    runs = {
        "score": score,
        "copy_of_score_bytes": copy_of(key_bytes, scratch),
        "compact": compact,
        "copy_of_moved_bytes": copy_of(round(moved), scratch),
        "large_copy": copy_of(LARGE_COPY, scratch),
        "plan": plan,
        "plan_per_layer": plan_per_layer,
    }
    if requests == 1:
        runs["raw_scores_alone"] = raw
    seconds = gpu_seconds(runs, repeats)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    # Bytes that cross the memory bus in a second: a copy reads each and writes each.
    bandwidth = 2 * LARGE_COPY / median["large_copy"]
    written = key_bytes / (2 * HEAD_DIM) * 4
    decode_step = (WEIGHT_BYTES + requests * live * LAYERS * KV_HEADS * HEAD_DIM * 4) / bandwidth
    compaction = median["score"] + median["plan"] + median["compact"]
    return {
        "requests": requests,
        "budget": budget,
        "live": live,
        "score_bytes_read": key_bytes,
        "bytes_moved": moved,
        **{f"seconds_{name}": value for name, value in median.items()},
        **{f"spread_{name}": max(times) - min(times) for name, times in seconds.items()},
        "copy_bandwidth": bandwidth,
        "score_share_of_bandwidth": (key_bytes + written) / median["score"] / bandwidth,
        "score_over_copy": median["score"] / median["copy_of_score_bytes"],
        "compact_share_of_bandwidth": 2 * moved / median["compact"] / bandwidth,
        "compact_share_of_same_copy": median["copy_of_moved_bytes"] / median["compact"],
        "cpu_seconds_score": cpu_seconds(score, repeats),
        "cpu_seconds_plan": cpu_seconds(plan, repeats),
        "cpu_seconds_compact": cpu_seconds(compact, repeats),
        "least_seconds_of_128_decode_steps": 128 * decode_step,
        "share_of_128_decode_steps": compaction / (128 * decode_step),
    }


def tiling_times(requests: int, budget: int, repeats: int) -> list[dict[str, Any]]:
    """Seconds of scoring, by how the keys are cut up; fastest first."""
    keys, _, weights, batches = make_steps(requests, budget + INTERVAL)

    def scoring(tiling: Tiling) -> Callable[[int], object]:
        return lambda turn: with_triton.score(keys, weights, batches[turn % len(batches)], tiling)

    seconds = gpu_seconds({str(index): scoring(tiling) for index, tiling in enumerate(TILINGS)}, repeats)
    rows = [
        {**asdict(tiling), "requests": requests, "seconds": statistics.median(seconds[str(index)])}
        for index, tiling in enumerate(TILINGS)
    ]
    return sorted(rows, key=lambda row: float(row["seconds"]))


# Report ----------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, default=Path("gpu-kernels.json"), help="file for the figures")
    parser.add_argument("--quick", action="store_true", help="1 and 16 requests only, fewer repeats")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu/kernels.py: torch sees no GPU here, so there is nothing to check or measure.")

    torch.manual_seed(time.time_ns() % 2**31)  # every run checks other numbers
    checked = checks("cuda")
    for case in checked:
        if not case["passed"]:
            print("FAILED", case)
    worst = max(case["worst_score_error"] for case in checked if "worst_score_error" in case)
    print(f"{sum(case['passed'] for case in checked)} of {len(checked)} checks passed; worst score error {worst:.1e}")

    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "multiprocessors": torch.cuda.get_device_properties(0).multi_processor_count,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "checks": checked,
        "rows": [],
        "tilings": [],
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(report, indent=2) + "\n")

    repeats = 9 if arguments.quick else 25
    for requests in (1, 16) if arguments.quick else (1, 16, 64):
        for budget in (1024, 2048):
            report["rows"].append(measure(requests, budget, repeats))
            torch.cuda.empty_cache()
    report["tilings"] = [tiling_times(requests, 2048, 5 if arguments.quick else 11) for requests in (1, 16)]
    arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    print_table(report)
    if not all(case["passed"] for case in checked):
        sys.exit("Some checks failed: see the lines that begin with FAILED.")


def print_table(report: dict[str, Any]) -> None:
    print(f"\n{report['device']}, torch {report['torch']}, triton {report['triton']}; microseconds, medians")
    print("Shares are of the bandwidth of a 4 GiB copy; the last column is of 128 decode steps at that bandwidth.")
    headings = ("requests", "budget", "score", "share", "plan", "compact", "share", "cpu", "GB/s", "of 128 steps")
    print("".join(f"{heading:>13}" for heading in headings))
    for row in report["rows"]:
        cpu = row["cpu_seconds_score"] + row["cpu_seconds_plan"] + row["cpu_seconds_compact"]
        cells = (
            row["requests"],
            row["budget"],
            f"{1e6 * row['seconds_score']:.1f}",
            f"{row['score_share_of_bandwidth']:.1%}",
            f"{1e6 * row['seconds_plan']:.1f}",
            f"{1e6 * row['seconds_compact']:.1f}",
            f"{row['compact_share_of_bandwidth']:.1%}",
            f"{1e6 * cpu:.1f}",
            f"{row['copy_bandwidth'] / 1e9:.0f}",
            f"{row['share_of_128_decode_steps']:.2%}",
        )
        print("".join(f"{cell:>13}" for cell in cells))
    for rows in report["tilings"]:
        best = rows[0]
        default = next(row for row in rows if asdict(with_triton.TILING).items() <= row.items())
        print(
            f"tiling for {best['requests']} requests: fastest {best['tiles']} tiles of {best['tile']}, "
            f"{best['stages']} stages, {best['warps']} warps: {1e6 * best['seconds']:.1f}; "
            f"default: {1e6 * default['seconds']:.1f}"
        )


if __name__ == "__main__":
    main()
