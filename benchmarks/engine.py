"""vLLM with and without compression in the same KV memory, and without it in memory for every whole request ("roomy"):
`trifleet bench engine`.

All engines are up at once and take turns, round by round, so that a busy machine slows all sides alike. Plain vLLM is
vLLM's own worker and scheduler, untouched. All run in eager mode a model of `benchmarks.models`, whose shape is that
of a deployment or the bundled one's; outputs run to their full length (`ignore_eos`), and every round has prompts that
no side has seen. What our parts cost where nothing is compacted, and where a step's time goes, is `benchmarks.steps`.
"""

from benchmarks.loads import AMPLE, BLOCK_SIZE, SIDES, TIGHT, Load, engine_settings

# isort: split
import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from vllm import AsyncEngineArgs, SamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.metrics.loggers import StatLoggerBase

from benchmarks import steps
from benchmarks.machine import machine
from benchmarks.models import Model, Name, model
from triattention.bounds import cdiv
from triattention.report import REPORT_KEY, EngineReport

WARM_UP_TOKENS = 50


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

    def __init__(self, name: str, model: Model, load: Load) -> None:
        self.tap = _Tap()
        settings = engine_settings(model, load, name) | {"disable_log_stats": True}  # vLLM's own loggers; the tap stays
        self.client = AsyncLLM.from_engine_args(
            AsyncEngineArgs(**settings), stat_loggers=[lambda config, index: self.tap]
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
            step_seconds = after.step_seconds - (before.step_seconds if before else 0.0)
            share = (after.compaction_seconds - (before.compaction_seconds if before else 0.0)) / step_seconds
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
async def sides(model: Model, loads: Mapping[str, Load]) -> AsyncIterator[dict[str, Side]]:
    """An engine for each name, sized for its load; "ours" is compressed."""
    started: dict[str, Side] = {}
    try:
        for name, load in loads.items():
            started[name] = Side(name, model, load)
        yield started
    finally:
        for side in started.values():
            side.client.shutdown(timeout=5)


async def compare(model: Model, loads: Mapping[str, Load], rounds: int) -> dict[str, list[Round]]:
    """`rounds` rounds of each side in turn, the first side changing each time, after a short one that does not
    count."""
    results: dict[str, list[Round]] = {name: [] for name in loads}
    async with sides(model, loads) as engines:
        for name, side in engines.items():
            await side.run(replace(loads[name], output_tokens=WARM_UP_TOKENS), -1)
        for number in range(rounds):
            for name in loads if number % 2 == 0 else reversed(list(loads)):
                results[name].append(await engines[name].run(loads[name], number))
    return results


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Round by round: lower quartile, median, upper quartile."""
    quartiles: list[float] = np.quantile(np.divide(ours, theirs), [0.25, 0.5, 0.75]).tolist()
    return quartiles


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


def bench_engine(name: Name = "deployment", tight_rounds: int = 5, pairs: int = 8) -> dict[str, Any]:
    """The figures of the command; see its help."""
    about = machine("vllm", "torch")
    roomy = replace(TIGHT, pool_tokens=TIGHT.whole_tokens)
    with model(name) as chosen:
        tight = asyncio.run(compare(chosen, {**dict.fromkeys(SIDES, TIGHT), "roomy": roomy}, tight_rounds))
        ample = steps.ample(chosen, AMPLE, pairs, rounds=3)
        split = steps.split(chosen, TIGHT)
    figures: dict[str, Any] = {**about, "model": name}
    speeds = {side: [each.tokens_per_second for each in rounds] for side, rounds in tight.items()}
    for figure, ours, theirs in (
        ("ratio_tight", speeds["ours"], speeds["plain"]),
        ("ratio_roomy", speeds["ours"], speeds["roomy"]),
        ("ratio_ample", ample["ours"], ample["plain"]),
    ):
        low, figures[figure], high = ratio(ours, theirs)
        figures[f"{figure}_quartiles"] = [low, high]
    figures["tight"] = {**asdict(TIGHT), **{side: summary(rounds) for side, rounds in tight.items()}}
    figures["roomy_pool_tokens"] = roomy.pool_tokens
    speed = {side: {"tokens_per_second": statistics.median(rounds)} for side, rounds in ample.items()}
    figures["ample"] = {**asdict(AMPLE), **speed}
    figures["step_milliseconds"] = split
    figures["preemptions_plain"] = figures["tight"]["plain"]["preemptions"]
    figures["preemptions_ours"] = figures["tight"]["ours"]["preemptions"]
    figures["compaction_share"] = figures["tight"]["ours"]["compaction_share"]
    return figures
