"""The `trifleet` command line: what a person types and sees. Owns no decision; each command calls its part."""

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from benchmarks.cli import app as bench_app
from benchmarks.quality.cli import evaluate
from dashboards.cli import app as dashboards_app
from deploy.calibrate_cli import calibrate
from deploy.doctor_cli import doctor
from deploy.fleet import FleetError, answers, end_politely, endpoint, running_fleet
from deploy.keys_cli import app as keys_app
from deploy.kubernetes.cli import app as k8s_app
from deploy.output import writable
from deploy.plan_cli import plan
from deploy.settings import FleetSettings, SettingsError, load_settings

LOCAL = Path(__file__).parent / "configs" / "local.yaml"

app = typer.Typer(
    help="A fleet of vLLM engines that serve long reasoning in bounded KV memory.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(dashboards_app, name="dashboards")
app.add_typer(bench_app, name="bench")
app.add_typer(k8s_app, name="k8s")
app.add_typer(keys_app, name="keys")
app.command()(plan)
app.command()(evaluate)
app.command()(calibrate)
app.command()(doctor)
console = Console()

SettingsFile = Annotated[Path, typer.Option("--file", "-f", help="The fleet's settings (YAML).")]


@app.command()
def up(file: SettingsFile = LOCAL) -> None:
    """Start the fleet and keep it up until Ctrl-C."""
    with _sentences():
        settings = load_settings(file)
        with _shown_fleet(settings) as url:
            console.print(f"\nThe fleet serves [bold]{settings.served_model_name}[/] at [bold]{url}/v1[/]\n")
            console.print(_curl_line(settings, url), soft_wrap=True, highlight=False)
            console.print("\n[dim]Ctrl-C stops it.[/]")
            with suppress(KeyboardInterrupt):
                signal.pause()


@app.command()
def demo(
    file: SettingsFile = LOCAL,
    compare: Annotated[
        bool, typer.Option("--compare", help="The same load again with compression off, in the same KV memory.")
    ] = False,
    json: Annotated[
        Path | None, typer.Option("--json", help="Write the figures to this file.", callback=writable)
    ] = None,
) -> None:
    """Send a mixed load of short chats and long reasoning, and show what compression did."""
    from deploy.demo import DemoError, run_demo, show, write_json

    with _sentences(DemoError):
        settings = load_settings(file)
        url = endpoint(settings)
        if answers(url):
            if compare:
                raise FleetError(
                    f"A fleet answers at {url} already, and --compare starts its own twice: stop that one first."
                )
            results = [run_demo(url, settings.served_model_name, console)]
        else:
            runs = [(settings, "With compression")]
            if compare:
                runs.append((settings.without_compression(), "Without compression"))
            results = []
            for one, title in runs:
                with _shown_fleet(one, title if compare else "Fleet"):
                    results.append(run_demo(url, one.served_model_name, console, title=title))
        show(console, *results)
        if json is not None:
            write_json(json, *results)
            console.print(f"\nFigures: {json}")
        if any(result.errors for result in results):
            raise typer.Exit(1)


@app.command()
def status(
    file: SettingsFile = LOCAL,
    once: Annotated[bool, typer.Option("--once", help="Draw once instead of live.")] = False,
    json: Annotated[
        Path | None, typer.Option("--json", help="Write the fleet's state to this file.", callback=writable)
    ] = None,
) -> None:
    """Watch every replica's KV blocks, requests and compactions, and the queue."""
    from deploy.status import show_status

    with _sentences():
        show_status(endpoint(load_settings(file)), console, once, json)


@contextmanager
def _shown_fleet(settings: FleetSettings, title: str = "Fleet") -> Iterator[str]:
    """A running fleet with its start and its stop shown as lines with times."""
    began = time.monotonic()
    spinner = Progress(
        SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console, transient=True
    )
    with spinner:
        task = spinner.add_task(f"{title}: starting")

        def step(part: str) -> None:
            spinner.update(task, description=f"{title}: {part}")

        with running_fleet(settings, step) as url:
            spinner.stop()
            spinner.update(task, visible=False)
            console.print(f"[green]✓[/] {title} up in {time.monotonic() - began:.0f} s")
            try:
                yield url
            finally:
                console.print("Stopping …")
    console.print("[green]✓[/] Stopped; no process is left.")


def _curl_line(settings: FleetSettings, url: str) -> str:
    message = f'{{"model": "{settings.served_model_name}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
    return f"curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{message}'"


@contextmanager
def _sentences(*more: type[Exception]) -> Iterator[None]:
    """Known mistakes end as a sentence and exit code 1; Ctrl-C and a polite kill end cleanly."""
    end_politely()
    known: tuple[type[Exception], ...] = (SettingsError, FleetError, *more)
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)
    except known as error:
        console.print(str(error), style="red", markup=False, highlight=False)
        sys.exit(1)
