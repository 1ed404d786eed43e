"""Plain vLLM and ours over loads and sizes of KV memory, in a steady state: `trifleet bench sweep`.

Each cell has its own two engines, or ours alone where plain vLLM does not start because the KV memory does not hold one
whole request. So many clients as the load says send one request after the other, each of the same output length; their
first ones are shorter, by another part each, so that later ones end spread over time. A side is measured once it has
generated what fills its KV memory, or after WARM_UP_SECONDS where that takes too long: before that nobody lacks memory.
Tokens are counted when they are generated, so a request need not end within the time.
"""

from benchmarks.loads import PROMPT_ROOM, SIDES, Load

# isort: split
import asyncio
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

import bundled
from benchmarks.engine import Side, sides
from benchmarks.machine import machine
from benchmarks.models import Model, Name, model

BUDGET = 256
WARM_UP_SECONDS = 90
PROMPT_FOR = 2000
"""Output tokens that prompts ask for, whatever the load's: under 100 tokens each. No bundled task has the longest."""


@dataclass(frozen=True)
class CellLoad(Load):
    """A cell's load. Its engines take nothing longer, so that plain vLLM starts wherever one request fits whole."""

    @property
    def max_model_len(self) -> int:
        return self.output_tokens + PROMPT_ROOM


def bench_sweep(name: Name, loads: Sequence[tuple[int, int]], pools: Sequence[int], seconds: float) -> dict[str, Any]:
    """`loads`: (requests at once, output tokens of each); `pools`: tokens of KV memory. Each side takes `seconds`."""
    about = machine("vllm", "torch")
    cells = []
    with model(name) as chosen:
        for (requests, output_tokens), pool_tokens in itertools.product(loads, pools):
            load = CellLoad(requests, output_tokens, pool_tokens, BUDGET)
            cells.append(asyncio.run(_cell(chosen, load, seconds)))
    return {**about, "model": name, "budget": BUDGET, "seconds": seconds, "cells": cells}


async def _cell(model: Model, load: Load, seconds: float) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "requests": load.requests,
        "output_tokens": load.output_tokens,
        "pool_tokens": load.pool_tokens,
    }
    names = SIDES if load.fits_whole else ("ours",)
    async with sides(model, dict.fromkeys(names, load)) as engines:
        for name in names:
            figures[name] = await _steady(engines[name], load, seconds)
    if load.fits_whole:
        figures["ratio"] = figures["ours"]["tokens_per_second"] / figures["plain"]["tokens_per_second"]
    return figures


async def _steady(side: Side, load: Load, seconds: float) -> dict[str, Any]:
    clients = [asyncio.create_task(_client(side, load, number)) for number in range(load.requests)]
    try:
        for _ in range(WARM_UP_SECONDS):
            await asyncio.sleep(1)
            if side.tap.generated_tokens >= load.pool_tokens:
                break
        tokens, preemptions, began = side.tap.generated_tokens, side.tap.preemptions, time.monotonic()
        await asyncio.sleep(seconds)
        took = time.monotonic() - began
        return {
            "tokens_per_second": (side.tap.generated_tokens - tokens) / took,
            "preemptions": side.tap.preemptions - preemptions,
        }
    finally:
        for client in clients:
            client.cancel()
        await asyncio.gather(*clients, return_exceptions=True)


async def _client(side: Side, load: Load, number: int) -> None:
    """Sends requests one after the other until it is cancelled."""
    for turn in itertools.count():
        share = (number + 1) / load.requests if turn == 0 else 1.0
        params = SamplingParams(
            max_tokens=max(1, int(load.output_tokens * share)),
            ignore_eos=True,
            temperature=0,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        prompt = bundled.demo_prompt(turn * load.requests + number, PROMPT_FOR)
        async for _ in side.client.generate(prompt, params, f"{number}-{turn}"):
            pass


def table_of(figures: dict[str, Any]) -> Table:
    """Ratios of tokens per second: a row for each load, a column for each size of KV memory."""
    pools = sorted({cell["pool_tokens"] for cell in figures["cells"]})
    table = Table(title=f"Ours over plain vLLM, tokens per second (model: {figures['model']})")
    table.add_column("requests x output tokens")
    for pool in pools:
        table.add_column(f"{pool:,} tokens of KV", justify="right")
    for load, cells in itertools.groupby(figures["cells"], lambda cell: (cell["requests"], cell["output_tokens"])):
        by_pool = {cell["pool_tokens"]: cell for cell in cells}
        shown = [f"{by_pool[pool]['ratio']:.2f}" if "ratio" in by_pool.get(pool, ()) else "" for pool in pools]
        table.add_row(f"{load[0]} x {load[1]:,}", *shown)
    return table
