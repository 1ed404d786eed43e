"""`trifleet demo`: send the mixed load to a running fleet, watch it, and say what compression did.

Owns the progress display, the reading of `/metrics`, the result and its table. Starting and restarting the
fleet is the command line's.
"""

import asyncio
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families
from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from deploy import metrics
from deploy.keys import key_header
from deploy.load import Outcome, mixed_load, run_load
from deploy.metrics import Descriptor

DEFAULT_REQUESTS = 36
DEFAULT_CONCURRENCY = 24
SETTLE_SECONDS = 5.0
WIDE_TERMINAL = 120


class DemoError(RuntimeError):
    """The demo cannot run; the message is one sentence."""


class Scrape:
    """The samples of one reading of `/metrics`."""

    def __init__(self, text: str) -> None:
        self._samples: defaultdict[str, list[tuple[dict[str, str], float]]] = defaultdict(list)
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                self._samples[sample.name].append((sample.labels, sample.value))

    def by_replica(self, metric: Descriptor) -> dict[str, float]:
        """Values by replica, summed over the other labels."""
        values: defaultdict[str, float] = defaultdict(float)
        for labels, value in self._samples[metric.name]:
            values[labels["replica"]] += value
        return dict(values)

    def total(self, metric: Descriptor) -> int:
        return int(sum(self.by_replica(metric).values()))


@dataclass(frozen=True)
class DemoResult:
    """One run of the load. Counts are those of this run; the peak is since the engines started."""

    requests: int
    errors: int
    output_tokens: int
    compactions: int
    freed_blocks: int
    reclaimed_bytes: int
    stranded_slots: int
    preemptions: int
    peak_blocks_per_request: int
    tokens_per_second: float
    placements: dict[str, int]
    """Replica -> requests placed there."""
    total_blocks: dict[str, int]
    """Replica -> size of its pool."""
    seconds: float
    first_token_seconds_short: float | None
    """Median over the short requests."""
    first_token_seconds_long: float | None
    error_sentences: tuple[str, ...]

    @classmethod
    def of(cls, outcomes: list[Outcome], before: Scrape, after: Scrape, seconds: float) -> "DemoResult":
        def grown(metric: Descriptor) -> int:
            return after.total(metric) - before.total(metric)

        placed_before = before.by_replica(metrics.PLACEMENTS)
        tokens = sum(outcome.output_tokens for outcome in outcomes)
        errors = [outcome.error for outcome in outcomes if outcome.error is not None]
        return cls(
            requests=len(outcomes),
            errors=len(errors),
            output_tokens=tokens,
            compactions=grown(metrics.COMPACTIONS),
            freed_blocks=grown(metrics.FREED_BLOCKS),
            reclaimed_bytes=grown(metrics.RECLAIMED_BYTES),
            stranded_slots=grown(metrics.STRANDED_SLOTS),
            preemptions=grown(metrics.PREEMPTIONS),
            peak_blocks_per_request=int(max(after.by_replica(metrics.PEAK_BLOCKS_PER_REQUEST).values())),
            tokens_per_second=round(tokens / seconds, 1),
            placements={
                replica: int(count - placed_before.get(replica, 0))
                for replica, count in after.by_replica(metrics.PLACEMENTS).items()
            },
            total_blocks={r: int(blocks) for r, blocks in after.by_replica(metrics.TOTAL_BLOCKS).items()},
            seconds=seconds,
            first_token_seconds_short=_median(o.first_token_seconds for o in outcomes if not o.request.is_long),
            first_token_seconds_long=_median(o.first_token_seconds for o in outcomes if o.request.is_long),
            error_sentences=tuple(dict.fromkeys(errors)),
        )


def run_demo(
    endpoint: str,
    model: str,
    console: Console,
    requests: int = DEFAULT_REQUESTS,
    concurrency: int = DEFAULT_CONCURRENCY,
    title: str = "Mixed load",
) -> DemoResult:
    """Send the load to the fleet at `endpoint` (its root, as http://127.0.0.1:8000) under a progress bar.

    Errors of single requests are part of the result. Raises `DemoError` if the fleet cannot be asked at all.
    """
    return asyncio.run(_run(endpoint, model, console, requests, concurrency, title))


async def _run(endpoint: str, model: str, console: Console, requests: int, concurrency: int, title: str) -> DemoResult:
    load = mixed_load(requests)
    progress = load_progress(console)
    async with httpx.AsyncClient(base_url=endpoint, timeout=30, headers=key_header()) as http:
        before = await _scrape(http)
        if not before.by_replica(metrics.TOTAL_BLOCKS):
            raise DemoError(f"no replica has reported to the fleet at {endpoint}: wait until it is up and try again")
        started = time.monotonic()
        with progress:
            bar = progress.add_task(title, total=requests, tokens=0, rate=0.0, headroom="")
            tokens = 0

            def on_tokens(count: int) -> None:
                nonlocal tokens
                tokens += count
                progress.update(bar, tokens=tokens, rate=tokens / (time.monotonic() - started))

            watching = asyncio.create_task(_watch_headroom(http, progress))
            try:
                outcomes = await run_load(
                    endpoint, model, load, concurrency, on_tokens, lambda _: progress.advance(bar)
                )
                seconds = time.monotonic() - started
            finally:
                watching.cancel()
        after = await _settled(http)
    return DemoResult.of(outcomes, before, after, seconds)


def load_progress(console: Console) -> Progress:
    """In a narrow terminal the bar and the headroom give way, and not the count of requests or the time."""
    columns: list[ProgressColumn] = [
        SpinnerColumn(),
        TextColumn("[bold]{task.description}"),
        MofNCompleteColumn(),
        TextColumn("requests · {task.fields[tokens]:,} tokens · {task.fields[rate]:,.0f} tokens/s"),
        TimeElapsedColumn(),
    ]
    if console.width >= WIDE_TERMINAL:
        columns.insert(2, BarColumn())
        columns.append(TextColumn("{task.fields[headroom]}"))
    return Progress(*columns, console=console)


async def _watch_headroom(http: httpx.AsyncClient, progress: Progress) -> None:
    """Show each replica's headroom beside the bar until cancelled. A missed reading is no harm."""
    while True:
        try:
            values = (await _scrape(http)).by_replica(metrics.HEADROOM_BLOCKS)
        except DemoError:
            values = {}
        shown = " ".join(f"{blocks:.0f}" for _, blocks in sorted(values.items()))
        for task in progress.task_ids:
            progress.update(task, headroom=f"[cyan]headroom {shown} blocks" if shown else "")
        await asyncio.sleep(1.0)


async def _scrape(http: httpx.AsyncClient) -> Scrape:
    try:
        response = await http.get("/metrics")
        response.raise_for_status()
    except httpx.HTTPError as error:
        raise DemoError(f"{http.base_url}/metrics does not answer ({error}): is the fleet up?") from error
    return Scrape(response.text)


async def _settled(http: httpx.AsyncClient) -> Scrape:
    """The metrics once the last request's blocks are back, or as they are after SETTLE_SECONDS."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        scrape = await _scrape(http)
        if scrape.total(metrics.HELD_BLOCKS) + scrape.total(metrics.RESERVATIONS) == 0:
            return scrape
        if time.monotonic() > deadline:
            return scrape
        await asyncio.sleep(0.2)


# -- the result ------------------------------------------------------------------------------------------


def result_json(compressed: DemoResult, uncompressed: DemoResult | None = None) -> dict[str, Any]:
    """What `--json` writes. Where both ran, `requests`, `errors` and the rest are those with compression."""
    names = (
        "requests", "errors", "output_tokens", "compactions", "freed_blocks", "reclaimed_bytes",
        "stranded_slots", "preemptions", "peak_blocks_per_request", "tokens_per_second", "placements",
    )  # fmt: skip
    result = {name: getattr(compressed, name) for name in names}
    if uncompressed is not None:
        # A comparison holds only if both runs answered everything.
        result["errors"] += uncompressed.errors
        for name in ("peak_blocks_per_request", "tokens_per_second", "preemptions"):
            result[f"{name}_uncompressed"] = getattr(uncompressed, name)
    return result


def write_json(path: Path, compressed: DemoResult, uncompressed: DemoResult | None = None) -> None:
    path.write_text(json.dumps(result_json(compressed, uncompressed), indent=2) + "\n")


def show(console: Console, compressed: DemoResult, uncompressed: DemoResult | None = None) -> None:
    """The table and the sentence under it, for someone who has never seen the fleet."""
    runs = [compressed] if uncompressed is None else [compressed, uncompressed]
    table = Table(
        title="What the fleet did", title_justify="left", box=box.SIMPLE_HEAD, show_header=uncompressed is not None
    )
    table.add_column("")
    table.add_column("with compression" if uncompressed else "", justify="right", style="bold green")
    if uncompressed is not None:
        table.add_column("without", justify="right")
    table.add_column("", style="dim")

    def row(name: str, values: Iterable[str], meaning: str) -> None:
        table.add_row(name, *values, meaning)

    row(
        "Requests answered",
        (f"{r.requests - r.errors} of {r.requests}" for r in runs),
        "short chats, long reasoning",
    )
    row("Output tokens", (f"{r.output_tokens:,}" for r in runs), "")
    row("Tokens per second", (f"{r.tokens_per_second:,.0f}" for r in runs), "the whole fleet")
    row("First token, short", (_seconds(r.first_token_seconds_short) for r in runs), "median, queue included")
    row("First token, long", (_seconds(r.first_token_seconds_long) for r in runs), "median, queue included")
    row(
        "Peak per request",
        (f"{r.peak_blocks_per_request} blocks" for r in runs),
        f"of {min(compressed.total_blocks.values())} blocks of KV memory per replica",
    )
    row("Preemptions", (str(r.preemptions) for r in runs), "requests that lost their memory and began anew")
    row("Compactions", (f"{r.compactions:,}" for r in runs), "")
    row("Blocks given back", (f"{r.freed_blocks:,}" for r in runs), "while their requests went on")
    row("Memory given back", (f"{r.reclaimed_bytes / 2**20:,.1f} MiB" for r in runs), "")
    row("Stranded slots", (str(r.stranded_slots) for r in runs), "memory lost to alignment")
    for number in range(len(compressed.placements)):
        name = f"Requests on replica {number + 1}"
        row(name, (str(_nth_placement(r, number)) for r in runs), "")
    console.print()
    console.print(table)
    console.print()
    if uncompressed is not None and compressed.errors == uncompressed.errors == 0:
        gain = compressed.tokens_per_second / uncompressed.tokens_per_second
        console.print(
            f"In the same KV memory, the fleet served [bold green]{gain:.1f} times[/] the tokens per second: "
            f"no request held more than {compressed.peak_blocks_per_request} blocks; without compression one "
            f"held {uncompressed.peak_blocks_per_request}."
        )
    for run in runs:
        for sentence in run.error_sentences:
            console.print(sentence, style="red", markup=False)


def _nth_placement(result: DemoResult, number: int) -> int:
    """Replicas get new names with every start, so the two runs are matched by order."""
    counts = [count for _, count in sorted(result.placements.items())]
    return counts[number] if number < len(counts) else 0


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f} s"
