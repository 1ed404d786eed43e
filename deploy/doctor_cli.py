"""`trifleet doctor`: would this model be served with compression on this machine, and why, or why not."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from deploy.output import writable
from deploy.settings import SettingsError, load_settings
from triattention.config import CompressionConfig

if TYPE_CHECKING:
    from triattention.vllm.diagnosis import Diagnosis

console = Console()
_MARKS = {"fine": "[green]✓[/]", "note": "[yellow]![/]", "refused": "[red]✗[/]"}


def doctor(
    model: Annotated[str | None, typer.Option("--model", help="The model's folder, or its id.")] = None,
    file: Annotated[
        Path | None,
        typer.Option("--file", "-f", help="Check a fleet's settings, and its model if --model is unset."),
    ] = None,
    statistics: Annotated[
        Path | None, typer.Option(help="The model's query statistics.", show_default="measured by the engine itself")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of the prompt whose bound is told.", min=1)] = 512,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write the findings to this file.", callback=writable)
    ] = None,
) -> None:
    """Say what would happen if this model were served with compression on this machine, and why."""
    try:
        arguments, config = _asked(model, file, statistics)
    except (SettingsError, ValidationError) as error:
        console.print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)
    # vLLM's own lines would stand between ours.
    os.environ.update(VLLM_LOGGING_LEVEL="CRITICAL", VLLM_CPU_OMP_THREADS_BIND="nobind")
    with console.status("Asking vLLM (no weights are loaded) ..."), _no_stderr():
        from triattention.vllm.diagnosis import diagnose

        diagnosis = diagnose(arguments, config, prompt_tokens, assume_memory=file is None)
    console.print(_table(arguments["model"], diagnosis))
    if json_path is not None:
        figures = {"model": arguments["model"], "served": diagnosis.served, **asdict(diagnosis)}
        json_path.write_text(json.dumps(figures, indent=2) + "\n")
    if not diagnosis.served:
        raise typer.Exit(1)


@contextmanager
def _no_stderr() -> Iterator[None]:
    """vLLM's libraries write to the file descriptor itself."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _asked(model: str | None, file: Path | None, statistics: Path | None) -> tuple[dict[str, Any], CompressionConfig]:
    """Arguments of `vllm serve`, and the compression."""
    if file is None:
        if model is None:
            raise SettingsError("neither --model nor --file is set: name a model or a fleet's settings")
        return {"model": model}, CompressionConfig.model_validate({"statistics": statistics or "self"})
    fleet = load_settings(file)
    if fleet.compression is None:
        raise SettingsError(f"compression is null in {file}: there is nothing to check")
    config = fleet.compression
    if statistics is not None:
        config = config.model_copy(update={"statistics": statistics})
    return fleet.engine_arguments() | ({} if model is None else {"model": model}), config


def _table(model: str, diagnosis: "Diagnosis") -> Table:
    verdict = "[green]served with compression[/]" if diagnosis.served else "[red]refused[/]"
    table = Table(
        title=f"{model}: would be {verdict}", title_justify="left", box=None, pad_edge=False, show_header=False
    )
    table.add_column("", no_wrap=True)
    table.add_column("", style="bold", no_wrap=True)
    table.add_column("")
    for finding in diagnosis.findings:
        table.add_row(_MARKS[finding.verdict], finding.subject, finding.sentence)
    return table
