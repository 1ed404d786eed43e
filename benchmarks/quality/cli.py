"""`trifleet evaluate`: what a person types and sees. Owns the choice of cells and the progress display."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

import bundled
from benchmarks.quality.problems import Problem, ProblemError, from_file, held_out
from benchmarks.quality.report import FULL, Report
from bundled import tasks
from triattention.config import CompressionConfig

POLICIES = (
    "triattention",
    "triattention:selection=per_layer_per_head",
    "random",
    "streaming",
    "key_norm",
    "keydiff",
)
BUDGETS = (64, 128, 256)
QUICK_POLICIES = ("triattention:selection=per_layer_per_head", "random")


def evaluate(
    model: Annotated[Path, typer.Option("--model", help="Folder of the model.")] = bundled.MODEL,
    statistics: Annotated[
        Path | None, typer.Option("--statistics", help="The model's query statistics, for triattention.")
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option("--task", help=f"One of {', '.join(tasks.TASKS)}; all, unless some are named."),
    ] = None,
    problems: Annotated[
        list[Path] | None, typer.Option("--problems", help="JSONL of prompts and answers, instead of tasks.")
    ] = None,
    policy: Annotated[
        list[str] | None, typer.Option("--policy", help="Name, or name:setting=value,... of the compression settings.")
    ] = None,
    budget: Annotated[list[int] | None, typer.Option("--budget", help="Tokens per KV head.")] = None,
    instances: Annotated[int, typer.Option("--instances", min=1, help="Requests of each task.")] = 200,
    low: Annotated[int, typer.Option("--shortest", min=40, help="Tokens of the shortest trace of a task.")] = 1_000,
    high: Annotated[int, typer.Option("--longest", max=tasks.LONGEST, help="And of the longest.")] = 1_600,
    interval: Annotated[int, typer.Option("--interval", help="Tokens between two compactions.")] = 32,
    window: Annotated[int, typer.Option("--window", help="Recent tokens that are always kept.")] = 32,
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="Longest reply to a problem of a file.")] = 4_096,
    sequences: Annotated[int, typer.Option("--sequences", help="Requests that an engine serves at once.")] = 100,
    kv_cache_mib: Annotated[int, typer.Option("--kv-cache-mib", help="KV memory of an engine.")] = 1_024,
    json: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    plots: Annotated[Path | None, typer.Option("--plots", help="Write two plots (PNG, SVG) to this folder.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few instances and cells, in five minutes.")] = False,
) -> None:
    """Measure how many answers stay right under compression, by policy and budget, in the real engine."""
    from benchmarks.quality.policies import PolicyError, compression

    # One process for the engine and us, so that blocks can be read between its steps; and its log stays quiet.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    console = Console(width=None if sys.stdout.isatty() else 120)
    if statistics is None and model == bundled.MODEL:
        statistics = bundled.STATISTICS
    policies = policy or list(QUICK_POLICIES if quick else POLICIES)
    budgets = budget or list(BUDGETS)
    count = min(instances, 40) if quick else instances
    try:
        if low > high:
            raise ProblemError(f"--shortest is {low} and --longest is {high}: raise --longest")
        asked: list[Problem] = []
        if problems:
            for path in problems:
                asked += from_file(path, max_tokens)
        else:
            for name in task or tasks.TASKS:
                if name not in tasks.TASKS:
                    raise ProblemError(f'task is "{name}": use one of {", ".join(tasks.TASKS)}')
                asked += held_out(name, count, low, high)
        cells: list[tuple[str, int | None, CompressionConfig | None]] = [(FULL, None, None)]
        cells += [
            (name, size, compression(name, size, interval, window, statistics)) for name in policies for size in budgets
        ]
        report = _run(console, model, cells, asked, sequences, kv_cache_mib << 20)
    except (PolicyError, ProblemError, OSError, ValueError) as error:
        console.print(str(error), style="red", markup=False, highlight=False)
        sys.exit(1)
    console.print(report.table())
    if json is not None:
        report.write_json(json)
        console.print(f"Figures: {json}")
    if plots is not None:
        for path in report.plot(plots):
            console.print(f"Plot: {path}")


def _run(
    console: Console,
    model: Path,
    cells: list[tuple[str, int | None, CompressionConfig | None]],
    problems: list[Problem],
    sequences: int,
    kv_cache_bytes: int,
) -> Report:
    """One engine after another, under one progress bar each."""
    from benchmarks.quality.engine import run

    runs = []
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[right]} right"),
        TimeElapsedColumn(),
    )
    for policy, budget, config in cells:
        with Progress(*columns, console=console) as progress:
            name = policy if budget is None else f"{policy} {budget}"
            bar = progress.add_task(name, total=len(problems), right=0)
            right = 0

            def done(correct: bool, bar: TaskID = bar, progress: Progress = progress) -> None:
                nonlocal right
                right += correct
                progress.update(bar, advance=1, right=right)

            runs.append((policy, budget, run(model, config, problems, sequences, kv_cache_bytes, done)))
    return Report.of("the bundled model" if model == bundled.MODEL else model.name, runs)
