"""vLLM with and without compression in the same KV memory: `trifleet bench engine`.

Both engines are up at once and take turns, round by round, so that a busy machine slows both sides alike. Plain vLLM is
vLLM's own worker and scheduler, untouched. Both run in eager mode a model of `benchmarks.models`, whose shape is that
of a deployment or the bundled one's; outputs run to their full length (`ignore_eos`), and every round has prompts that
neither side has seen.
"""

import os

# One thread an engine and the worker in the engine's process, as a replica of the fleet runs on a CPU.
os.environ.update(
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL="ERROR",
    OMP_NUM_THREADS="1",
)

import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from vllm import AsyncEngineArgs, SamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.metrics.loggers import StatLoggerBase

import bundled
from benchmarks.machine import machine
from benchmarks.models import Model, Name, model
from triattention.bounds import cdiv
from triattention.config import CompressionConfig
from triattention.report import REPORT_KEY, EngineReport
from triattention.vllm import engine_arguments, on_this_machine

BLOCK_SIZE = 32
SIDES = ("plain", "ours")
WARM_UP_TOKENS = 50


@dataclass(frozen=True)
class Load:
    """One round of one side: `requests` at once, each to `output_tokens`."""

    requests: int
    output_tokens: int
    pool_tokens: int
    budget: int

    def prompts(self, round_number: int) -> list[str]:
        """Of under 100 tokens, different in every round, the same for both sides."""
        first = round_number * self.requests
        return [bundled.demo_prompt(seed, self.output_tokens) for seed in range(first, first + self.requests)]


@dataclass
class Round:
    """What one round gave. Seconds are wall time; tokens are output tokens."""

    seconds: float
    tokens: int
    preemptions: int
    seconds_per_output_token: list[float]
    """Of each request: its mean over the tokens after the first."""
    peak_blocks: int
    """Most KV blocks that one request held. Plain vLLM's is its length in blocks: nothing is freed before the end."""
    compaction_share: float
    """Of the engine's step time."""

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


@dataclass
class _Tap(StatLoggerBase):
    """What vLLM and our scheduler report of every step."""

    preemptions: int = 0
    generated_tokens: int = 0
    seconds_per_output_token: list[float] = field(default_factory=list)
    report: EngineReport | None = None

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        if iteration_stats is not None:
            self.preemptions += iteration_stats.num_preempted_reqs
            self.generated_tokens += iteration_stats.num_generation_tokens
            for request in iteration_stats.finished_requests:
                self.seconds_per_output_token.append(request.mean_time_per_output_token)
        if scheduler_stats is not None and scheduler_stats.kv_connector_stats is not None:
            self.report = EngineReport.from_dict(scheduler_stats.kv_connector_stats[REPORT_KEY])

    def log_engine_initialized(self) -> None:
        pass


class Side:
    """One engine of the comparison."""

    def __init__(self, path: Path, load: Load, compression: CompressionConfig | None) -> None:
        self.tap = _Tap()
        arguments: dict[str, Any] = {
            "model": str(path),
            "max_model_len": max(4096, load.output_tokens + 192),
            "block_size": BLOCK_SIZE,
            "num_gpu_blocks_override": load.pool_tokens // BLOCK_SIZE,
            "max_num_seqs": load.requests,
            "max_num_batched_tokens": 2048,
            "enforce_eager": True,
            "disable_log_stats": True,  # vLLM's own loggers; the tap stays
        }
        if compression is not None:
            arguments |= engine_arguments(compression)
        self.client = AsyncLLM.from_engine_args(
            AsyncEngineArgs(**on_this_machine(arguments)), stat_loggers=[lambda config, index: self.tap]
        )

    async def run(self, load: Load, round_number: int) -> Round:
        """Send one round's requests all at once and wait for the last."""
        before, was = self.tap.report, self.tap.preemptions
        self.tap.seconds_per_output_token = []
        params = SamplingParams(
            max_tokens=load.output_tokens,
            ignore_eos=True,
            temperature=0,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        began = time.perf_counter()
        lengths = await asyncio.gather(
            *(
                self._one(prompt, params, f"{round_number}-{number}")
                for number, prompt in enumerate(load.prompts(round_number))
            )
        )
        seconds = time.perf_counter() - began
        after = self.tap.report
        share = 0.0
        if after is not None:
            steps = after.step_seconds - (before.step_seconds if before else 0.0)
            share = (after.compaction_seconds - (before.compaction_seconds if before else 0.0)) / steps
        return Round(
            seconds=seconds,
            tokens=sum(output for _, output in lengths),
            preemptions=self.tap.preemptions - was,
            seconds_per_output_token=self.tap.seconds_per_output_token,
            peak_blocks=after.peak_blocks_per_request if after else cdiv(max(map(sum, lengths)), BLOCK_SIZE),
            compaction_share=share,
        )

    async def _one(self, prompt: str, params: SamplingParams, request_id: str) -> tuple[int, int]:
        """(prompt tokens, output tokens) of a finished request."""
        async for output in self.client.generate(prompt, params, request_id):
            if output.finished:
                return len(output.prompt_token_ids or ()), len(output.outputs[0].token_ids)
        raise RuntimeError(f"request {request_id} ended without a last output")


@asynccontextmanager
async def sides(model: Model, load: Load) -> AsyncIterator[dict[str, Side]]:
    """Both engines over equal pools."""
    compression = CompressionConfig.model_validate(
        {"budget": load.budget, "interval": 128, "window": 64, "statistics": model.statistics}
    )
    started: dict[str, Side] = {}
    try:
        for name, config in zip(SIDES, (None, compression), strict=True):
            started[name] = Side(model.path, load, config)
        yield started
    finally:
        for side in started.values():
            side.client.shutdown(timeout=5)


async def compare(model: Model, load: Load, rounds: int) -> dict[str, list[Round]]:
    """`rounds` rounds of each side in turn, the first side changing each time, after a short one that does not
    count."""
    results: dict[str, list[Round]] = {name: [] for name in SIDES}
    async with sides(model, load) as engines:
        for side in engines.values():
            await side.run(replace(load, output_tokens=WARM_UP_TOKENS), -1)
        for number in range(rounds):
            for name in SIDES if number % 2 == 0 else reversed(SIDES):
                results[name].append(await engines[name].run(load, number))
    return results


def ratio(rounds: dict[str, list[Round]]) -> dict[str, float]:
    """Ours over plain in tokens per second, round by round: median and quartiles."""
    ratios = [
        ours.tokens_per_second / plain.tokens_per_second
        for ours, plain in zip(rounds["ours"], rounds["plain"], strict=True)
    ]
    low, median, high = np.quantile(ratios, [0.25, 0.5, 0.75])
    return {"median": float(median), "low": float(low), "high": float(high)}


def summary(rounds: Sequence[Round]) -> dict[str, Any]:
    """Medians over the rounds of one side; preemptions are of all rounds together."""
    speeds = [each.tokens_per_second for each in rounds]
    return {
        "tokens_per_second": statistics.median(speeds),
        "tokens_per_second_rounds": [round(speed, 1) for speed in speeds],
        "milliseconds_per_output_token": 1000
        * statistics.median(seconds for each in rounds for seconds in each.seconds_per_output_token),
        "preemptions": sum(each.preemptions for each in rounds),
        "peak_blocks_per_request": max(each.peak_blocks for each in rounds),
        "compaction_share": statistics.median(each.compaction_share for each in rounds),
    }


TIGHT = Load(requests=32, output_tokens=2000, pool_tokens=16_384, budget=256)
AMPLE = Load(requests=32, output_tokens=200, pool_tokens=32_768, budget=4096)
"""A budget that no request reaches: nothing is compacted, and what is left is what our parts cost. Many short
rounds, because the difference is smaller than the noise of one."""


def bench_engine(name: Name = "deployment", tight_rounds: int = 5, ample_rounds: int = 25) -> dict[str, Any]:
    """The figures of the command; see its help."""
    about = machine("vllm", "torch")
    with model(name) as chosen:
        tight = asyncio.run(compare(chosen, TIGHT, tight_rounds))
        ample = asyncio.run(compare(chosen, AMPLE, ample_rounds))
    figures: dict[str, Any] = {**about, "model": name}
    for loaded, load, rounds in (("tight", TIGHT, tight), ("ample", AMPLE, ample)):
        spread = ratio(rounds)
        figures[f"ratio_{loaded}"] = spread["median"]
        figures[f"ratio_{loaded}_quartiles"] = [spread["low"], spread["high"]]
        figures[loaded] = {**asdict(load), **{side: summary(rounds[side]) for side in SIDES}}
    figures["preemptions_plain"] = figures["tight"]["plain"]["preemptions"]
    figures["preemptions_ours"] = figures["tight"]["ours"]["preemptions"]
    figures["compaction_share"] = figures["tight"]["ours"]["compaction_share"]
    return figures
