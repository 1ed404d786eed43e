"""Time per output token against position: one long request of each side, in turns: `trifleet bench trace`.

Both engines run in this process and decode `TURN` tokens at a time, so that a busy machine slows both sides alike.
Plain vLLM's pool holds the whole request, ours its bound.
"""

import os

os.environ.update(
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL="ERROR",
    OMP_NUM_THREADS="1",
)

import statistics
import time
from itertools import pairwise
from typing import Any

from vllm import EngineArgs, SamplingParams
from vllm.v1.engine.llm_engine import LLMEngine

import bundled
from benchmarks.engine import BLOCK_SIZE, SIDES
from benchmarks.machine import machine
from triattention.bounds import blocks_bound, cdiv
from triattention.config import CompressionConfig
from triattention.vllm import engine_arguments

BUDGET, INTERVAL = 256, 128
TURN = 64
POINTS = 16


def bench_long_trace(tokens: int = 32_768) -> dict[str, Any]:
    """The figures of the command: milliseconds per token at POINTS positions, medians over the turns around each."""
    about = machine("vllm", "torch")
    prompt = bundled.demo_prompt(0, tokens)
    compression = CompressionConfig.model_validate(
        {"budget": BUDGET, "interval": INTERVAL, "window": 64, "statistics": bundled.STATISTICS}
    )
    bound = blocks_bound(4 * BLOCK_SIZE, tokens, BLOCK_SIZE, compression, in_flight_tokens=1)
    pools = {"plain": cdiv(tokens, BLOCK_SIZE), "ours": bound}
    engines = {
        side: _engine(tokens, pools[side] + 1, compression if side == "ours" else None)  # and the null block
        for side in SIDES
    }
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    for engine in engines.values():
        params = SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=0, detokenize=False)
        engine.add_request("trace", prompt, params)
        engine.step()  # the prompt
    while all(engine.has_unfinished_requests() for engine in engines.values()):
        turn = len(seconds["plain"])
        for side in SIDES if turn % 2 == 0 else reversed(SIDES):
            began = time.perf_counter()
            for _ in range(TURN):
                engines[side].step()
            seconds[side].append((time.perf_counter() - began) / TURN)
    for engine in engines.values():
        engine.engine_core.shutdown()
    turns = len(seconds["plain"]) - 1  # the last one is cut short
    edges = [point * turns // POINTS for point in range(POINTS + 1)]
    milliseconds = {
        side: [1000 * statistics.median(seconds[side][start:end]) for start, end in pairwise(edges)] for side in SIDES
    }
    return about | {
        "output_tokens": turns * TURN,
        "budget": BUDGET,
        "interval": INTERVAL,
        "pool_blocks": pools,
        "positions": [(start + end) * TURN // 2 for start, end in pairwise(edges)],
        "milliseconds_per_token": milliseconds,
        "growth": {side: row[-1] / row[0] for side, row in milliseconds.items()},
    }


def _engine(tokens: int, blocks: int, compression: CompressionConfig | None) -> LLMEngine:
    arguments: dict[str, Any] = {
        "model": str(bundled.MODEL),
        "max_model_len": tokens,
        "block_size": BLOCK_SIZE,
        "num_gpu_blocks_override": blocks,
        "kv_cache_memory_bytes": 1 << 28,  # not what is allocated, but vLLM sizes up the whole machine without it
        "max_num_seqs": 1,
        "max_num_batched_tokens": 2048,
        "enforce_eager": True,
        "disable_log_stats": True,
    }
    if compression is not None:
        arguments |= engine_arguments(compression)
        arguments["additional_config"]["triattention_reports"] = False
    return LLMEngine.from_engine_args(EngineArgs(**arguments))
