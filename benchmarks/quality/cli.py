"""`trifleet evaluate`: what a person types and sees. Owns the choice of cells and the progress display."""

import itertools
import os
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from multiprocessing import active_children, get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from queue import Empty
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import bundled
from benchmarks.environment import engine_environment
from benchmarks.quality.problems import Problem, ProblemError, from_file, held_out
from benchmarks.quality.report import FULL, Report
from bundled import tasks
from deploy.fleet import end_politely
from deploy.output import folder, writable
from triattention.config import CompressionConfig

if TYPE_CHECKING:
    from benchmarks.quality.engine import EngineRun

POLICIES = (
    "triattention",
    "triattention:selection=per_head",
    "random",
    "streaming",
    "key_norm",
    "keydiff",
)
BUDGETS = (128, 256, 320, 448)
QUICK_CELLS = (
    ("triattention", 320),
    ("triattention", 448),
    ("random", 448),
)
QUICK_INSTANCES = 24


class EngineLostError(RuntimeError):
    """An engine's process ended before its work did; the message is a sentence."""


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
    high: Annotated[int, typer.Option("--longest", max=tasks.LONGEST, help="And of the longest.")] = 2_250,
    interval: Annotated[int, typer.Option("--interval", help="Tokens between two compactions.")] = 32,
    window: Annotated[int, typer.Option("--window", help="Recent tokens that are always kept.")] = 32,
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="Longest reply to a problem of a file.")] = 4_096,
    sequences: Annotated[int, typer.Option("--sequences", help="Requests that an engine serves at once.")] = 128,
    engines: Annotated[
        int | None, typer.Option("--engines", min=1, help="Engines at once; two where there are no GPUs.")
    ] = None,
    kv_cache_mib: Annotated[int, typer.Option("--kv-cache-mib", help="KV memory of an engine.")] = 1_536,
    json: Annotated[
        Path | None, typer.Option("--json", help="Write the figures to this file.", callback=writable)
    ] = None,
    plots: Annotated[
        Path | None, typer.Option("--plots", help="Write two plots (PNG, SVG) to this folder.", callback=folder)
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few instances and cells, in five minutes.")] = False,
) -> None:
    """Measure how many answers stay right under compression, by policy and budget, in the real engine."""
    end_politely()
    import torch

    from benchmarks.quality.policies import PolicyError, compression

    # An engine and whoever steps it share a process, so that blocks can be read between steps; and all logs stay quiet.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    for name, value in engine_environment().items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    console = Console(width=None if sys.stdout.isatty() else 120)
    if statistics is None and model == bundled.MODEL:
        statistics = bundled.STATISTICS
    pairs = list(itertools.product(policy or POLICIES, budget or BUDGETS))
    if quick:
        instances = min(instances, QUICK_INSTANCES)
        pairs = pairs if policy or budget else list(QUICK_CELLS)
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
                asked += held_out(name, instances, low, high)
        cells: list[tuple[str, int | None, CompressionConfig | None]] = [(FULL, None, None)]
        cells += [(name, size, compression(name, size, interval, window, statistics)) for name, size in pairs]
        count_at_once = engines or (1 if torch.cuda.is_available() else min(2, os.cpu_count() or 1))
        report = _run(console, model, cells, asked, sequences, kv_cache_mib << 20, count_at_once, json)
    except (PolicyError, ProblemError, EngineLostError, OSError, ValueError) as error:
        console.print(str(error), style="red", markup=False, highlight=False)
        sys.exit(1)
    console.print(report.table())
    if json is not None:
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
    engines: int,
    json: Path | None,
) -> Report:
    """So many engines at a time, each in a process of its own with its share of the cores and a progress bar.

    What is finished is in `json` at any time: full attention's cells and those of the policies so far.
    Raises `EngineLostError` where one of the processes ends.
    """
    from benchmarks.quality.engine import prepare, run_cell

    title = "the bundled model" if model == bundled.MODEL else model.name
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // engines))
    spawned = get_context("spawn")
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[right]} right"),
        TimeElapsedColumn(),
    )
    answers = spawned.Queue()
    pool = ProcessPoolExecutor(min(engines, len(cells)), spawned, initializer=prepare, initargs=(answers,))
    runs: list[Future[EngineRun]] = []
    workers: set[BaseProcess] = set()
    remedy = (
        f"lower --engines ({engines} now), --kv-cache-mib ({kv_cache_bytes >> 20} now) or --sequences ({sequences} now)"
    )
    with Progress(*columns, console=console) as progress, _ended_at_once(pool, workers, remedy):
        bars = [
            progress.add_task(name if size is None else f"{name} {size}", total=len(problems), right=0, start=False)
            for name, size, _ in cells
        ]
        # The processes inherit what is blocked. Ctrl-C reaches the whole group, and is for this one, which ends them.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            for number, (_, _, config) in enumerate(cells):
                runs.append(pool.submit(run_cell, model, config, problems, sequences, kv_cache_bytes, number))
                workers.update(active_children())
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        right = [0] * len(cells)
        answered = written = 0
        while written < len(cells) or answered < len(cells) * len(problems):
            with suppress(Empty):
                number, correct = answers.get(timeout=0.2)
                answered += 1
                progress.start_task(bars[number])
                right[number] += correct
                progress.update(bars[number], advance=1, right=right[number])
            if failed := next((run for run in runs if run.done() and run.exception() is not None), None):
                failed.result()
            finished = [number for number, run in enumerate(runs) if run.done()]
            if 0 in finished and len(finished) > written:
                written = len(finished)
                report = Report.of(title, [(*cells[number][:2], runs[number].result()) for number in finished])
                if json is not None:
                    report.write_json(json)
    return report


@contextmanager
def _ended_at_once(pool: ProcessPoolExecutor, workers: set[BaseProcess], remedy: str) -> Iterator[None]:
    """Where anything is raised, a refusal or Ctrl-C, no cell goes on and none begins.

    Raises `EngineLostError` where one of the workers has ended, and says how.
    """
    try:
        yield
    except BrokenProcessPool:
        pool.shutdown()  # it ends the other workers itself; then all have their codes
        codes = {worker.exitcode for worker in workers} - {0, -signal.SIGTERM}
        if -signal.SIGKILL in codes:
            ended = "was killed, most likely for memory"
        else:
            ended = f"ended of itself with code {', '.join(map(str, codes))}"
        raise EngineLostError(f"An engine's process {ended}: {remedy}") from None
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in active_children():
            process.terminate()
        raise
    pool.shutdown()
