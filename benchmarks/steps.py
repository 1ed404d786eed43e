"""Single steps of engines that run in this process, for `trifleet bench engine`: what our parts cost where nothing is
compacted, and where a step's time goes where something is.

What our parts cost is less than one round of seconds differs from the next of its own accord. So both engines decode
the same requests in lock step, one step of one and one of the other: whatever slows the machine slows both. One pair of
engines still differs from another by a percent, by where their memory came to lie: so there are several pairs, of which
either side is built first in turn.
"""

from benchmarks.loads import SIDES, Load, engine_settings

# isort: split
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import vllm.v1.utils
from torch.profiler import ProfilerActivity, profile, record_function
from vllm import EngineArgs, SamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.llm_engine import LLMEngine

from benchmarks.models import Model
from triattention import kernels

KERNELS: dict[str, Callable[..., Any]] = {
    "squeeze": kernels.squeeze,
    "score": kernels.score,
    "plan": kernels.plan,
    "move": kernels.compact,
}
SPLIT_STEPS = 256
"""Two intervals: every request is compacted twice."""


def ample(model: Model, load: Load, pairs: int, rounds: int) -> dict[str, list[float]]:
    """Tokens per second of both sides in each of `rounds` of each pair of engines, under a load in which no memory is
    short and no budget is reached."""
    speeds: dict[str, list[float]] = {name: [] for name in SIDES}
    for pair in range(pairs):
        engines = {name: _engine(name, model, load) for name in (SIDES if pair % 2 == 0 else reversed(SIDES))}
        for number in range(-1, rounds):  # the first is not counted
            seconds = _in_turns(engines, load, number)
            for name in SIDES if number >= 0 else ():
                speeds[name].append(load.requests * load.output_tokens / seconds[name])
        for engine in engines.values():
            engine.engine_core.shutdown()
    return speeds


def _in_turns(engines: dict[str, LLMEngine], load: Load, number: int) -> dict[str, float]:
    """Seconds that each engine takes for one round."""
    for engine in engines.values():
        _send(engine, load, number)
    seconds = dict.fromkeys(engines, 0.0)
    order = list(engines)
    while any(engine.has_unfinished_requests() for engine in engines.values()):
        order.reverse()
        for name in order:
            began = time.perf_counter()
            engines[name].step()
            seconds[name] += time.perf_counter() - began
    return seconds


def split(model: Model, load: Load) -> dict[str, float]:
    """Milliseconds of a step in each of its parts, by torch's profiler, while all requests of the load run and are
    compacted; means over SPLIT_STEPS steps. The profiler slows what is many small operations."""
    engine = _engine("ours", model, load)
    _send(engine, load, 0)
    for _ in range(load.output_tokens // 3):
        engine.step()
    with ExitStack() as scopes:
        scopes.enter_context(patch.object(vllm.v1.utils, "_PROFILER_FUNC", record_function))
        for name, function in KERNELS.items():
            scopes.enter_context(patch.object(kernels, function.__name__, _recorded(name, function)))
        profiled = scopes.enter_context(profile(activities=[ProfilerActivity.CPU]))
        began = time.perf_counter()
        for _ in range(SPLIT_STEPS):
            engine.step()
        whole = 1000 * (time.perf_counter() - began) / SPLIT_STEPS
    engine.engine_core.shutdown()
    took = {event.key: event.cpu_time_total / 1000 / SPLIT_STEPS for event in profiled.key_averages()}
    forward, attention = took["gpu_model_runner: forward"], took["vllm::unified_attention_with_output"]
    parts = {
        "forward pass: attention": attention,
        "forward pass: all else": forward - attention,
        "logits": took["gpu_model_runner: postprocess"],
        "inputs and metadata": took["gpu_model_runner: preprocess"] - took["squeeze"],
        **{name: took[name] for name in KERNELS},
    }
    return parts | {"scheduling, sampling, output, all else": whole - sum(parts.values())}


def _recorded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        with record_function(name):
            return function(*arguments)

    return run


def _engine(side: str, model: Model, load: Load) -> LLMEngine:
    # With vLLM's statistics, with which our reports travel. Its console logger, which would take them for a KV
    # connector's, is left out at this level of logging.
    settings = engine_settings(model, load, side) | {"disable_log_stats": False}
    return LLMEngine.from_engine_args(EngineArgs(**settings))


def _send(engine: LLMEngine, load: Load, round_number: int) -> None:
    params = SamplingParams(
        max_tokens=load.output_tokens, ignore_eos=True, temperature=0, output_kind=RequestOutputKind.FINAL_ONLY
    )
    for number, prompt in enumerate(load.prompts(round_number)):
        engine.add_request(f"{round_number}-{number}", prompt, params)
