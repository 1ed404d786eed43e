"""A mixed load for minutes or hours, and whether anything grows that should not: `trifleet bench soak`.

Beside the demo's load, clients leave in the middle of their streams and others send requests that must be refused.
Every two seconds the memory and the open files of every process of the fleet are read; at the end every block must be
back.
"""

import asyncio
import contextlib
import math
import re
import time
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

import bundled
from benchmarks.chaos import settled
from benchmarks.machine import machine
from deploy import metrics
from deploy.demo import Scrape
from deploy.fleet import running_fleet
from deploy.keys import key_header
from deploy.load import Outcome, mixed_load, run_load
from deploy.settings import FleetSettings, load_settings

WAVE, CONCURRENCY = 24, 12
SAMPLE_SECONDS = 2.0
WARM_UP = 0.4
"""Share of the time before memory counts: engines and Ray fill their caches first."""
MEGABYTE = 1 << 20


@dataclass
class Traces:
    """Samples over time of every process, by name and id: seconds, bytes of resident memory, open files."""

    samples: defaultdict[str, list[tuple[float, int, int]]] = field(default_factory=lambda: defaultdict(list))
    series: list[int] = field(default_factory=list)
    """Number of series on the fleet's /metrics, reading by reading."""

    def take(self, seconds: float) -> None:
        for process in psutil.Process().children(recursive=True):
            try:
                name = _name(process)
                self.samples[f"{name} ({process.pid})"].append((seconds, process.memory_info().rss, process.num_fds()))
            except psutil.Error:
                continue  # it ended between the listing and the reading

    def growth(self, whole_seconds: float) -> dict[str, dict[str, Any]]:
        """Of every process that was there to the end: the slope of its memory after the warm-up, and its bounds."""
        table = {}
        for name, samples in sorted(self.samples.items()):
            seconds, memory, files = np.array(samples, dtype=np.float64).T
            if seconds[-1] < whole_seconds - 3 * SAMPLE_SECONDS or seconds[0] > WARM_UP * whole_seconds:
                continue
            warm = seconds >= WARM_UP * whole_seconds
            slope = np.polyfit(seconds[warm], memory[warm], 1)[0]
            table[name] = {
                "rss_slope_mb_per_hour": round(float(slope) * 3600 / MEGABYTE, 2),
                "rss_mb_first": round(float(memory[warm][0]) / MEGABYTE, 1),
                "rss_mb_last": round(float(memory[-1]) / MEGABYTE, 1),
                "rss_mb_most": round(float(memory.max()) / MEGABYTE, 1),
                "rss_mb_by_minute": [
                    round(float(memory[seconds <= minute * 60][-1]) / MEGABYTE, 1)
                    for minute in range(math.ceil(seconds[0] / 60) or 1, int(seconds[-1] / 60) + 1)
                ],
                "open_files_first": int(files[warm][0]),
                "open_files_last": int(files[-1]),
            }
        return table


@dataclass
class Disturbances:
    """What became of those who disturb."""

    left: int = 0
    refused: int = 0
    errors: list[str] = field(default_factory=list)


def bench_soak(settings_file: Path, minutes: float) -> dict[str, Any]:
    """The figures of the command."""
    settings = load_settings(settings_file)
    about = machine("vllm", "ray", "torch")
    with running_fleet(settings) as url:
        return about | asyncio.run(_soak(url, settings, minutes * 60))


async def _soak(url: str, settings: FleetSettings, seconds: float) -> dict[str, Any]:
    traces = Traces()
    before = await asyncio.to_thread(_scrape, url)
    began = time.monotonic()
    watch = asyncio.create_task(_watch(traces, url, began))
    outcomes: list[Outcome] = []
    disturbed = Disturbances()
    after_first_wave = 0
    for wave in count():
        if time.monotonic() - began >= seconds:
            break
        load = mixed_load(WAVE, seed=wave * WAVE)
        results, _ = await asyncio.gather(
            run_load(url, settings.served_model_name, load, CONCURRENCY, lambda tokens: None, lambda outcome: None),
            _disturb(url, settings.served_model_name, wave, disturbed),
        )
        outcomes += results
        if wave == 0:
            # Those who disturb have brought the last labels, reasons of refusals that only the router knows.
            after_first_wave = len(traces.series)
    lasted = time.monotonic() - began
    watch.cancel()
    held, reserved = await settled(url)
    after = await asyncio.to_thread(_scrape, url)
    errors = [outcome.error for outcome in outcomes if outcome.error is not None] + disturbed.errors
    growth = traces.growth(lasted)
    return {
        "minutes": round(lasted / 60, 2),
        "requests": len(outcomes) + disturbed.left + disturbed.refused + len(disturbed.errors),
        "requests_to_their_end": len(outcomes),
        "clients_that_left": disturbed.left,
        "requests_refused_as_they_must": disturbed.refused,
        "errors": len(errors),
        "error_sentences": sorted(set(errors)),
        "output_tokens": sum(outcome.output_tokens for outcome in outcomes),
        "compactions": after.total(metrics.COMPACTIONS) - before.total(metrics.COMPACTIONS),
        "preemptions": after.total(metrics.PREEMPTIONS) - before.total(metrics.PREEMPTIONS),
        "leaked_blocks": held,
        "leaked_reservations": reserved,
        "metrics_series_first": traces.series[min(after_first_wave, len(traces.series) - 1)],
        "metrics_series_last": traces.series[-1],
        "processes": growth,
        "rss_slope_mb_per_hour": {name: row["rss_slope_mb_per_hour"] for name, row in growth.items()},
    }


async def _watch(traces: Traces, url: str, began: float) -> None:
    async with httpx.AsyncClient(timeout=30, headers=key_header()) as client:
        while True:
            await asyncio.to_thread(traces.take, time.monotonic() - began)
            with contextlib.suppress(httpx.HTTPError):  # the load itself tells whether the fleet answers
                text = (await client.get(f"{url}/metrics")).raise_for_status().text
                traces.series.append(sum(not line.startswith("#") for line in text.splitlines()))
            await asyncio.sleep(SAMPLE_SECONDS)


def _scrape(url: str) -> Scrape:
    return Scrape(httpx.get(f"{url}/metrics", timeout=30, headers=key_header()).raise_for_status().text)


async def _disturb(url: str, model: str, wave: int, ends: Disturbances) -> None:
    """Clients that leave after some of their stream, and requests that must be refused."""
    async with httpx.AsyncClient(timeout=120, base_url=f"{url}/v1", headers=key_header()) as client:
        for number in range(4):
            messages = [{"role": "user", "content": bundled.demo_prompt(wave * 4 + number, 1800)}]
            body = {"model": model, "messages": messages, "max_tokens": 1800, "stream": True}
            try:
                async with client.stream("POST", "/chat/completions", json=body) as response:
                    response.raise_for_status()
                    pieces = 0
                    async for _ in response.aiter_bytes():
                        pieces += 1
                        if pieces > 20 * number:
                            break
                ends.left += 1
            except httpx.HTTPError as error:
                ends.errors.append(f"a client that was to leave: {error!r}")
            for wrong in ({**body, "max_tokens": 10**9}, {**body, "model": "none"}, {**body, "messages": "none"}):
                try:
                    status = (await client.post("/chat/completions", json=wrong)).status_code
                except httpx.HTTPError as error:
                    ends.errors.append(f"a request that was to be refused: {error!r}")
                    continue
                if 400 <= status < 500:
                    ends.refused += 1
                else:
                    ends.errors.append(f"a request that was to be refused: {status}")


def _name(process: psutil.Process) -> str:
    """What a person calls the process: Ray's title of a worker, or the program."""
    words = process.cmdline()
    title = words[0] if words else process.name()
    if title.startswith("ray::"):
        return re.sub(r"\W*(ServeReplica:)?", "", title.removeprefix("ray::"), count=1).split(".")[0]
    return Path(title.split()[0]).name if title else process.name()
