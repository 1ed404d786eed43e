"""`trifleet bench`: each command measures one thing, prints a table and, with --json, writes the figures."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, RenderableType
from rich.table import Table
from typer.core import TyperGroup

from deploy.fleet import FleetError, end_politely
from deploy.output import picture, writable
from deploy.settings import SettingsError

if TYPE_CHECKING:
    from benchmarks.models import Name


class _Sentences(TyperGroup):
    """Its commands end politely, and known mistakes as a sentence and exit code 1."""

    def invoke(self, ctx: Any) -> Any:
        end_politely()
        try:
            return super().invoke(ctx)
        except (SettingsError, FleetError) as error:
            Console().print(str(error), style="red", markup=False, highlight=False)
            sys.exit(1)


app = typer.Typer(cls=_Sentences, no_args_is_help=True)

LOCAL = Path(__file__).parents[1] / "deploy" / "configs" / "local.yaml"
Settings = Annotated[Path, typer.Option("--file", "-f", help="the fleet's settings")]
Json = Annotated[Path | None, typer.Option("--json", help="file for the figures", callback=writable)]


# Requests that end before they are compacted, and then two numbers of requests and two lengths; KV memory from one that
# thrashes to one that holds 32 requests of 2,000 tokens nearly whole.
ALL_LOADS = "32x300,32x2000,32x8000,128x2000,128x8000"
ALL_POOLS = "8192,16384,65536"


@app.callback()
def _measure() -> None:
    """Measure what the README states."""


@app.command()
def compaction(json_path: Json = None) -> None:
    """One compaction at Qwen3-8B's sizes: bytes moved and read, seconds against a plain copy, error of the scores."""
    from benchmarks.compaction import bench_compaction

    figures = bench_compaction()
    table = Table(title=f"One compaction, {figures['live']} tokens to {figures['budget']}, on {figures['device']}")
    for heading in ("", "bytes", "seconds", "a copy of the bytes", "ratio"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, size, copy in (("score", "score_bytes_read", "score_bytes"), ("compact", "bytes_moved", "moved_bytes")):
        table.add_row(
            name,
            f"{figures[size]:,}",
            f"{figures[f'seconds_{name}']:.6f}",
            f"{figures[f'seconds_copy_of_{copy}']:.6f}",
            f"{figures[f'{name}_over_copy']:.2f}",
        )
    table.add_row("plan", "", f"{figures['seconds_plan']:.6f}", "", "")
    table.add_row("a full slide would move", f"{figures['bytes_moved_full_slide']:,}", "", "", "")
    table.caption = (
        f"{figures['bytes_moved_ratio']:.1f} times fewer bytes than a full slide; largest error of the scores "
        f"{figures['collapsed_vs_17_offsets_max_relative_error']:.1e} of the head's largest"
    )
    _report(table, figures, json_path)


@app.command()
def eviction(json_path: Json = None) -> None:
    """Blocks that evicting 90 % of a request's tokens frees, without compaction and with it."""
    from benchmarks.compaction import bench_eviction

    figures = bench_eviction()
    table = Table(title=f"Of {figures['blocks_held']} blocks, {figures['share_evicted']:.1%} of the tokens evicted")
    for heading in ("keys", "kept set", "freed without compaction", "freed with compaction"):
        table.add_column(heading, justify="right" if heading.startswith("freed") else "left")
    for kind, sets in figures["keys"].items():
        for name, blocks in sets.items():
            freed = [
                f"{blocks[f'blocks_freed_{how}_compaction']} ({blocks[f'share_freed_{how}_compaction']:.1%})"
                for how in ("without", "with")
            ]
            table.add_row(kind, name, *freed)
    _report(table, figures, json_path)


@app.command()
def engine(
    json_path: Json = None,
    model: Annotated[
        str, typer.Option(help="deployment: a deployment's proportions, random weights; bundled: the bundled model")
    ] = "deployment",
    rounds: Annotated[int, typer.Option(min=2, help="rounds of each side under memory pressure")] = 5,
) -> None:
    """vLLM with and without compression in the same KV memory, tight and ample (about 15 minutes)."""
    from benchmarks.engine import bench_engine
    from benchmarks.tables import engine_sides

    figures = bench_engine(_model(model), tight_rounds=rounds)
    tight, ample = figures["tight"], figures["ample"]
    table = Table(title=f"Plain vLLM and ours, taking turns, model: {model}")
    for heading in ("KV memory", "", "tokens/s", "ms per token", "preemptions", "peak blocks", "compaction"):
        table.add_column(heading, justify="left" if heading in ("KV memory", "") else "right")
    for side, name in engine_sides(figures).items():
        row = tight[side]
        table.add_row(
            f"tight: {tight['pool_tokens']:,} tokens" if side == "plain" else "",
            name,
            f"{row['tokens_per_second']:,.0f}",
            f"{row['milliseconds_per_output_token']:.1f}",
            f"{row['preemptions']}",
            f"{row['peak_blocks_per_request']}",
            f"{row['compaction_share']:.1%}",
        )
    table.add_row("", "ours over plain", _spread(figures, "ratio_tight"))
    table.add_row("", "ours over the last", _spread(figures, "ratio_roomy"), end_section=True)
    for side in ("plain", "ours"):
        first = f"ample: {ample['pool_tokens']:,} tokens" if side == "plain" else ""
        table.add_row(first, side, f"{ample[side]['tokens_per_second']:,.0f}")
    table.add_row("", "ours over plain", _spread(figures, "ratio_ample"))
    parts = ", ".join(f"{part} {took:.2f}" for part, took in figures["step_milliseconds"].items())
    table.caption = f"A step of ours in tight memory, ms by the profiler: {parts}"
    _report(table, figures, json_path)


@app.command()
def http(
    json_path: Json = None,
    file: Settings = LOCAL,
    rounds: Annotated[int, typer.Option(min=2, help="rounds of streams a side")] = 7,
) -> None:
    """vLLM's own server against one replica behind the fleet's endpoint: tokens per second, waits for tokens."""
    from benchmarks.http_path import bench_http
    from benchmarks.tables import HTTP_COLUMNS, HTTP_SIDES

    figures = bench_http(file, rounds)
    table = Table(title=f"{figures['streams']} streams of {figures['tokens_per_stream']} tokens, taking turns")
    for heading in ("", *HTTP_COLUMNS):
        table.add_column(heading, justify="right" if heading else "left")
    for side, name in HTTP_SIDES.items():
        table.add_row(
            name,
            f"{figures['tokens_per_second'][side]:,.0f}",
            f"{figures['between_chunks_ms_p50'][side]:.1f} / {figures['between_chunks_ms_p99'][side]:.1f}",
            f"{figures['ttft_ms_p50_under_load'][side]:.1f}",
            f"{figures['ttft_ms_p50'][side]:.1f}",
        )
    table.caption = (
        f"ratio of tokens per second {_spread(figures, 'ratio_tokens_per_second')}; "
        f"added to the first token alone, median {figures['added_ttft_ms_p50']:.1f} ms"
    )
    _report(table, figures, json_path)


@app.command()
def router(
    json_path: Json = None,
    seconds: Annotated[float, typer.Option(min=1.0, help="length of each part")] = 10.0,
) -> None:
    """The real coordinator in Ray, with fake engines: latency and rate of its decisions, age of what it decides on."""
    from benchmarks.router import bench_router

    figures = bench_router(seconds)
    table = Table(title=f"One coordinator, {figures['replicas']} fake replicas")
    for heading in ("", "50th percentile", "99th percentile"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, figure in (("a decision", "acquire"), ("age of the report behind it", "report_age")):
        table.add_row(f"{name}, ms", *(f"{figures[f'{figure}_p{percent}_ms']:.2f}" for percent in (50, 99)))
    table.caption = (
        f"At {figures['steady_per_second']} requests a second. At most {figures['acquires_per_second']:,.0f} decisions "
        f"a second, with {figures['in_flight']} asked for at once."
    )
    _report(table, figures, json_path)


@app.command()
def trace(
    json_path: Json = None,
    tokens: Annotated[int, typer.Option(min=8192, help="length of the request")] = 32_768,
) -> None:
    """Time per output token against position, plain vLLM and ours, one long request each (about 2 minutes)."""
    from benchmarks.long_trace import bench_long_trace

    figures = bench_long_trace(tokens)
    table = Table(title="Milliseconds per output token, taking turns")
    for heading in ("position", "plain vLLM", "ours"):
        table.add_column(heading, justify="right")
    took = figures["milliseconds_per_token"]
    for position, plain, ours in zip(figures["positions"], took["plain"], took["ours"], strict=True):
        table.add_row(f"{position:,}", f"{plain:.2f}", f"{ours:.2f}")
    table.caption = f"last over first: {figures['growth']['plain']:.2f} and {figures['growth']['ours']:.2f}"
    _report(table, figures, json_path)


@app.command()
def start(json_path: Json = None, file: Settings = LOCAL) -> None:
    """From where `trifleet up` reads its settings to the first answer, and what takes the time."""
    from benchmarks.start import bench_start

    figures = bench_start(file)
    table = Table(title=f"A fleet of {figures['replicas']} replicas: {figures['seconds']:.1f} s to its first answer")
    table.add_column("part")
    table.add_column("seconds", justify="right")
    for part, seconds in figures["parts"].items():
        table.add_row(part, f"{seconds:.1f}")
    _report(table, figures, json_path)


@app.command()
def sweep(
    json_path: Json = None,
    model: Annotated[str, typer.Option(help="deployment or bundled, as for `bench engine`")] = "bundled",
    seconds: Annotated[float, typer.Option(min=2.0, help="how long each side of each cell is measured")] = 25.0,
    loads: Annotated[str, typer.Option(help="REQUESTSxOUTPUT_TOKENS, separated by commas")] = ALL_LOADS,
    pools: Annotated[str, typer.Option(help="KV memory in tokens, separated by commas")] = ALL_POOLS,
) -> None:
    """Plain vLLM and ours over loads and sizes of KV memory: where compression pays, where not (about 25 minutes)."""
    name = _model(model)
    shapes = [_numbers("--loads", load, "REQUESTSxOUTPUT_TOKENS", ALL_LOADS) for load in loads.split(",")]
    sizes = [_numbers("--pools", pool, "TOKENS", ALL_POOLS)[0] for pool in pools.split(",")]

    from benchmarks.sweep import bench_sweep, table_of

    figures = bench_sweep(name, [(requests, tokens) for requests, tokens in shapes], sizes, seconds)
    _report(table_of(figures), figures, json_path)


@app.command()
def soak(
    json_path: Json = None,
    minutes: Annotated[float, typer.Option(min=0.2, help="how long the load goes on")] = 60.0,
    file: Settings = LOCAL,
) -> None:
    """A mixed load with clients that leave and requests to be refused: memory, open files and blocks must not grow."""
    from benchmarks.soak import bench_soak

    figures = bench_soak(file, minutes)
    table = Table(title=f"{figures['requests']:,} requests in {figures['minutes']:.1f} minutes")
    for heading in ("process", "MB at the end", "most", "MB an hour", "open files"):
        table.add_column(heading, justify="left" if heading == "process" else "right")
    for name, row in figures["processes"].items():
        table.add_row(
            name,
            f"{row['rss_mb_last']:,.0f}",
            f"{row['rss_mb_most']:,.0f}",
            f"{row['rss_slope_mb_per_hour']:+,.1f}",
            f"{row['open_files_first']} to {row['open_files_last']}",
        )
    table.caption = (
        f"{figures['errors']} errors, {figures['leaked_blocks']} leaked blocks, "
        f"{figures['leaked_reservations']} leaked reservations, {figures['metrics_series_first']} to "
        f"{figures['metrics_series_last']} series on /metrics"
    )
    _report(table, figures, json_path)
    if any(figures[zero] != 0 for zero in ("errors", "leaked_blocks", "leaked_reservations")):
        raise typer.Exit(1)


@app.command()
def chaos(
    json_path: Json = None,
    file: Settings = LOCAL,
    faults: Annotated[str, typer.Option(help="which ones, with commas; all without")] = "",
) -> None:
    """Kill and stop parts of a running fleet under load: what fails, how soon it is whole again, what is left over."""
    from benchmarks.chaos import bench_chaos
    from benchmarks.faults import DISK_FULL, FAULTS, NODE_REMOVED

    known = [*FAULTS, NODE_REMOVED, DISK_FULL]
    chosen = [name for name in faults.split(",") if name] or known
    if unknown := sorted(set(chosen) - set(known)):
        raise typer.BadParameter(f"there is no fault {unknown[0]}: choose from {', '.join(known)}")
    figures: dict[str, Any] = {}
    for figures in bench_chaos(file, chosen):
        _write(figures, json_path)
    columns = (
        "requests", "failed_visible", "failed_unstreamed", "failed_silent", "hung", "recovery_seconds",
        "leaked_blocks", "leaked_reservations", "leftover_processes",
    )  # fmt: skip
    table = Table(title="Faults under steady load", box=None, pad_edge=False)
    table.add_column("fault", no_wrap=True)
    for heading in columns:
        words = heading.split("_")
        table.add_column(" ".join(words), justify="right", width=max(map(len, words)))
    for name, row in figures["faults"].items():
        shown = row | {"leftover_processes": len(row["leftover_processes"])}
        table.add_row(name, *("-" if shown[column] is None else str(shown[column]) for column in columns))
    _report(table, figures, None)
    zeros = ("failed_silent", "hung", "leaked_blocks", "leaked_reservations", "leftover_processes")
    rows = figures["faults"].values()
    if any(row["recovery_seconds"] is None or any(row[zero] not in (0, []) for zero in zeros) for row in rows):
        raise typer.Exit(1)


@app.command()
def fuzz(
    json_path: Json = None,
    file: Settings = LOCAL,
    cases: Annotated[int, typer.Option(min=1, help="hostile requests to send")] = 5000,
    seed: int = 0,
) -> None:
    """Hostile requests, made from the endpoint's own OpenAPI document: no unmeant 5xx, nothing hung, nothing leaked."""
    if find_spec("schemathesis") is None:
        raise FleetError(
            "schemathesis, which makes the requests, is not installed: install it with its dependencies as "
            "requirements/cpu.txt pins them"
        )
    from benchmarks.fuzz import bench_fuzz

    figures = bench_fuzz(file, cases, seed)
    table = Table(title=f"{figures['cases']:,} hostile requests, seed {seed}")
    table.add_column("status")
    table.add_column("answers", justify="right")
    for status, count in figures["statuses"].items():
        table.add_row(status, f"{count:,}")
    table.caption = (
        f"{figures['unexpected_5xx']} unexpected 5xx, {figures['hung']} hung, "
        f"{figures['leaked_blocks']} leaked blocks, {figures['leaked_reservations']} leaked reservations"
    )
    _report(table, figures, json_path)
    if any(figures[zero] != 0 for zero in ("unexpected_5xx", "hung", "leaked_blocks", "leaked_reservations")):
        raise typer.Exit(1)


@app.command()
def fleet_sim(
    replicas: Annotated[int, typer.Option(min=2, help="simulated replicas")] = 1000,
    requests: Annotated[int, typer.Option(min=1, help="requests of the trace")] = 1_000_000,
    scenario: Annotated[str, typer.Option(help="busy, moderate, light, overload, or busy-reserving")] = "busy",
    seed: int = 0,
    processes: Annotated[int, typer.Option(min=1, help="routers simulated at once")] = 2,
    plot: Annotated[Path | None, typer.Option(help="file for the picture (PNG, SVG or PDF)", callback=picture)] = None,
    json_path: Json = None,
) -> None:
    """Headroom against other ways to route: the coordinator's own code, simulated replicas, virtual time."""
    from benchmarks.fleet_simulation.report import plot as draw
    from benchmarks.fleet_simulation.report import table_of
    from benchmarks.fleet_simulation.run import run_scenario
    from benchmarks.fleet_simulation.trace import SCENARIOS

    if scenario not in SCENARIOS:
        raise typer.BadParameter(f"there is no scenario {scenario}: choose one of {', '.join(SCENARIOS)}")
    console = Console()
    with console.status(f"Simulating {requests:,} requests under each router"):
        figures = run_scenario(
            SCENARIOS[scenario],
            replicas,
            requests,
            seed,
            processes,
            on_done=lambda way, of: console.print(f"[green]✓[/] {way.title}: {of['cpu_seconds']:.0f} s of a core"),
        )
    _report(table_of(figures), figures, json_path)
    if plot is not None:
        draw(figures, plot)


def _model(name: str) -> "Name":
    from benchmarks.models import NAMES

    for known in NAMES:
        if known == name:
            return known
    raise typer.BadParameter(f"there is no model {name}: choose one of {', '.join(NAMES)}")


def _numbers(option: str, text: str, form: str, example: str) -> list[int]:
    """The numbers of one part of an option's value, as many as its form has, all of them above 0."""
    parts = text.split("x")
    if len(parts) != len(form.split("x")) or not all(part.isascii() and part.isdigit() and int(part) for part in parts):
        raise typer.BadParameter(f'{option} has "{text}": write {form}, separated by commas, as in {example}')
    return [int(part) for part in parts]


def _spread(figures: dict[str, Any], name: str) -> str:
    low, high = figures[f"{name}_quartiles"]
    return f"{figures[name]:.3f} ({low:.3f} to {high:.3f})"


def _report(table: RenderableType, figures: dict[str, Any], json_path: Path | None) -> None:
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    _write(figures, json_path)


def _write(figures: dict[str, Any], json_path: Path | None) -> None:
    if json_path is not None:
        json_path.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    app()
