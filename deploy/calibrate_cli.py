"""`trifleet calibrate`: query statistics of a model, measured or imported, and how concentrated its queries are."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from deploy.output import picture, writable

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from triattention.concentration import Concentration
    from triattention.statistics import QueryStatistics

console = Console()


def _json_object(value: str) -> dict[str, Any]:
    try:
        overrides = json.loads(value)
    except json.JSONDecodeError:
        overrides = None
    if not isinstance(overrides, dict):
        raise typer.BadParameter(f"{value} is none: write a JSON object, as for vLLM")
    return overrides


def calibrate(
    model: Annotated[str, typer.Option("--model", help="The model's folder, or its id.")],
    out: Annotated[
        Path, typer.Option("--out", help="Write the statistics to this file (safetensors).", callback=writable)
    ],
    text: Annotated[
        Path | None,
        typer.Option("--text", help="A text file like the traffic to come.", show_default="a text that ships"),
    ] = None,
    upstream: Annotated[
        Path | None, typer.Option("--import", help="Convert this .pt file of upstream's TriAttention instead.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Stop after so many tokens.", min=1)] = 500_000,
    chunk_tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens per forward pass; memory grows with it.",
            min=2,
            show_default="4096, or the model's context if less",
        ),
    ] = None,
    hf_overrides: Annotated[
        dict[str, Any] | None,
        typer.Option(help="What vLLM is given under this name, as for YaRN.", metavar="JSON", parser=_json_object),
    ] = None,
    device: Annotated[str, typer.Option(help="Where the model runs: cpu, cuda, cuda:1 ...")] = "cpu",
    heatmap: Annotated[
        Path | None,
        typer.Option(help="Draw every head's mean resultant length into this picture.", callback=picture),
    ] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write the figures of every head here.", callback=writable)
    ] = None,
) -> None:
    """Measure a model's query statistics, which the triattention policy scores with."""
    import torch
    import transformers

    from triattention.calibration import check_out
    from triattention.concentration import Concentration
    from triattention.upstream import import_statistics

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        check_out(out, model)
        config = _config(model, hf_overrides)
        if upstream is None:
            statistics = _measured(model, config, text, out, max_tokens, chunk_tokens, device)
        elif text is not None:
            raise ValueError("--text and --import are both set: keep one of them")
        else:
            statistics = import_statistics(upstream, model, config)
            statistics.save(out)
    except UnicodeDecodeError as error:
        said = f"--text is {text}, which is not UTF-8 text ({error.reason} at byte {error.start}): convert it to UTF-8"
        console.print(said, style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)
    except (ValueError, OSError) as error:
        console.print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)
    except torch.OutOfMemoryError:
        message = f"The model and a chunk of text do not fit on {device}: lower --chunk-tokens, or set --device cpu"
        console.print(message, style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)
    concentration = Concentration.of(statistics)
    console.print(_table(statistics.model_id, concentration))
    console.print(f"Statistics: {out}", soft_wrap=True)
    if heatmap is not None:
        concentration.draw(heatmap, f"{statistics.model_id}: concentration of queries before RoPE")
        console.print(f"Heat map: {heatmap}", soft_wrap=True)
    if json_path is not None:
        figures = {"model": statistics.model_id, "tokens": statistics.tokens, "heads": concentration.plain()}
        json_path.write_text(json.dumps(figures, indent=2) + "\n")
        console.print(f"Figures: {json_path}", soft_wrap=True)


def _config(model: str, overrides: dict[str, Any] | None) -> "PreTrainedConfig":
    from triattention.rope import RopeParameters, read_config

    if overrides is None:
        return read_config(model)
    try:
        config = read_config(model, overrides)
        RopeParameters.from_config(config)
    except ValueError:
        raise
    except Exception as error:  # as transformers tells of values that it cannot use
        raise ValueError(
            f"--hf-overrides is {json.dumps(overrides)}, which makes no config ({' '.join(str(error).split())}): name "
            "values as the model's config.json does, and rope_parameters whole, rope_theta included"
        ) from error
    return config


def _measured(
    model: str,
    config: "PreTrainedConfig",
    text: Path | None,
    out: Path,
    max_tokens: int,
    chunk_tokens: int | None,
    device: str,
) -> "QueryStatistics":
    from triattention.calibration import SHIPPED_TEXT, calibrate

    columns = (
        TextColumn("[bold]Calibrating"), BarColumn(), MofNCompleteColumn(), TextColumn("tokens"),
        TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)
        statistics = calibrate(
            model,
            text or SHIPPED_TEXT,
            out,
            chunk_tokens=chunk_tokens,
            max_tokens=max_tokens,
            on_progress=lambda done, total: bar.update(task, completed=done, total=total),
            device=device,
            config=config,
        )
        elapsed = bar.tasks[task].elapsed or 0
    console.print(f"[green]✓[/] {statistics.tokens:,} tokens in {elapsed:.0f} s")
    return statistics


def _table(model: str, concentration: "Concentration") -> Table:
    table = Table(
        title=f"Mean resultant length of {model}'s queries before RoPE, in hundredths, heads 0, 1, 2 ...",
        title_justify="left",
        caption="100: all queries of a head point one way, and their mean predicts what they read; 0: nothing.",
        caption_justify="left",
        box=None,
        pad_edge=False,
    )
    table.add_column("layer", justify="right", style="bold")
    table.add_column("dominant band")
    table.add_column("energy-weighted over bands")
    for row, layer in enumerate(concentration.layers):
        cells = (
            " ".join(f"{100 * value:3.0f}" for value in values[row].tolist())
            for values in (concentration.dominant, concentration.weighted)
        )
        table.add_row(str(layer), *cells)
    return table
