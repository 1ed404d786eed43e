"""`trifleet plan`: the sums of `deploy/plan.py` as a table, as JSON and as a picture."""

import json
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from deploy.model_shape import ModelError, read_shape
from deploy.output import picture, writable
from deploy.plan import GIB, Gpu, Load, Plan, PlanError, Prices, Side, make_plan
from triattention.config import CompressionConfig

console = Console()
MOST_GIB = 1e6
"""Far above what there is; infinity is no size."""
_SIDES = ("without compression", "with compression")


def plan(
    model: Annotated[
        str, typer.Argument(help="A model's folder or config.json, or qwen3-8b, qwen3-32b, qwen3-32b-4bit.")
    ],
    gpu_gib: Annotated[float, typer.Option(help="Memory of one GPU in GiB.", min=0.1, max=MOST_GIB)],
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of a request's prompt.", min=1)] = 512,
    output_tokens: Annotated[int, typer.Option(help="Tokens of its answer, reasoning included.", min=1)] = 32768,
    users: Annotated[int, typer.Option(help="Requests to decode at the same time.", min=1)] = 1,
    budget: Annotated[int, typer.Option(help="Tokens kept behind the prompt (compression.budget).")] = 2048,
    interval: Annotated[int, typer.Option(help="Tokens between compactions (compression.interval).")] = 128,
    tensor_parallel: Annotated[int, typer.Option(help="GPUs of one replica.", min=1)] = 1,
    block_size: Annotated[int, typer.Option(help="Tokens of a KV block; vLLM's default on a GPU is 16.", min=1)] = 16,
    max_num_batched_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens of a step: sliding layers hold twice as much of a prompt. [default: vLLM's]", min=1),
    ] = None,
    utilization: Annotated[
        float, typer.Option(help="Share of the GPU that vLLM may use (gpu_memory_utilization).", min=0.01, max=1)
    ] = 0.92,
    overhead_gib: Annotated[
        float,
        typer.Option(
            help="CUDA context, activations and graphs in GiB; vLLM's log says it at start.", min=0, max=MOST_GIB
        ),
    ] = 1.0,
    weights_gib: Annotated[
        float | None,
        typer.Option(help="Size of the weights, where the config does not tell it.", min=0.001, max=MOST_GIB),
    ] = None,
    price: Annotated[float | None, typer.Option(help="Price of one GPU for one hour.", min=0)] = None,
    watts: Annotated[float | None, typer.Option(help="Power that one GPU draws.", min=0)] = None,
    price_kwh: Annotated[float | None, typer.Option(help="Price of one kWh.", min=0)] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write the figures to this file.", callback=writable)
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the plan into this file (PNG, SVG or PDF).", callback=picture)
    ] = None,
) -> None:
    """Plan capacity: requests a GPU holds, and GPUs for so many users, with and without compression."""
    if price_kwh is not None and watts is None:
        _fail(f"--price-kwh is {price_kwh}, but --watts is not set: set it to the power that one GPU draws.")
    try:
        # Only sizes matter here, so the policy is one that needs no statistics.
        compression = CompressionConfig.model_validate(
            {"budget": budget, "interval": interval, "window": 0, "policy": "random"}
        )
        shape = read_shape(model, None if weights_gib is None else int(weights_gib * GIB))
        gpu = Gpu(int(gpu_gib * GIB), utilization, int(overhead_gib * GIB))
        load = Load(prompt_tokens, output_tokens, users)
        made = make_plan(
            shape,
            gpu,
            load,
            compression,
            tensor_parallel=tensor_parallel,
            block_size=block_size,
            max_num_batched_tokens=max_num_batched_tokens,
            prices=Prices(price, watts, price_kwh),
        )
    except (ModelError, PlanError) as error:
        _fail(str(error))
    except ValidationError as error:
        _fail("\n".join(f"--{problem['loc'][0]}: {problem['msg']}." for problem in error.errors()))
    console.print(sums_table(made))
    console.print(sides_table(made))
    console.print(verdict(made), soft_wrap=True, highlight=False)
    if json_path is not None:
        json_path.write_text(json.dumps(made.to_dict(), indent=2) + "\n")
        console.print(f"Figures: {json_path}", soft_wrap=True, highlight=False)
    if plot is not None:
        draw(made, plot)
        console.print(f"Picture: {plot}", soft_wrap=True, highlight=False)


def _fail(sentence: str) -> NoReturn:
    console.print(sentence, style="red", markup=False, highlight=False, soft_wrap=True)
    sys.exit(1)


def sums_table(made: Plan) -> Table:
    """How the KV pool's size and a block's come about."""
    model, gpu = made.model, made.gpu
    table = _table(f"{model.name} on GPUs of {gib(gpu.memory_bytes)}", "", "", "each GPU")
    split = f" / {made.tensor_parallel} GPUs" if made.tensor_parallel > 1 else ""
    table.add_row("weights", f"{model.weights_sum}{split}", gib(made.weights_bytes))
    table.add_row("overhead", "CUDA context, activations, CUDA graphs", gib(gpu.overhead_bytes))
    pool = f"{gpu.utilization:.0%} of {gib(gpu.memory_bytes)} − weights − overhead"
    table.add_row("KV pool", pool, f"[bold]{gib(made.kv_bytes)}[/]")
    heads = -(-model.kv_heads // made.tensor_parallel)
    layers = f"{model.full_layers} layers × {heads} KV heads × {model.head_dim} × {model.bytes_per_value} bytes"
    table.add_row("one token", f"keys and values: 2 × {layers}", kib(made.bytes_per_token))
    table.add_row("one block", f"{made.block_size} tokens", kib(made.bytes_per_block))
    if model.sliding_layers:
        window = f"{model.sliding_layers} layers see {model.sliding_window:,} tokens"
        table.add_row("sliding layers", f"{window}, per request", gib(made.sliding_bytes_per_request))
    pool_blocks = f"{gib(made.kv_bytes)} / {kib(made.bytes_per_block)}, one block stays empty"
    table.add_row("blocks", pool_blocks, f"{made.total_blocks:,}")
    return table


def sides_table(made: Plan) -> Table:
    load, sides = made.load, (made.without_compression, made.with_compression)
    title = f"Prompt of {load.prompt_tokens:,} and answer of {load.total_tokens - load.prompt_tokens:,} tokens"
    table = _table(title, "", *_SIDES)
    table.add_row("tokens held at most", *(f"{side.blocks_per_request * made.block_size:,}" for side in sides))
    table.add_row("blocks of a request", *(f"{side.blocks_per_request:,}" for side in sides))
    table.add_row("KV memory of a request", *(gib(side.bytes_per_request) for side in sides))
    table.add_row("requests at once", *(_requests(side) for side in sides))
    table.add_row(f"GPUs for {load.users:,} at once", *(_or_never(side, f"{side.gpus}") for side in sides))
    rows = {
        "cost per hour": [side.cost_per_hour for side in sides],
        "power, kW": [side.kilowatts for side in sides],
        "energy cost per hour": [side.energy_cost_per_hour for side in sides],
    }
    for name, values in rows.items():
        if any(value is not None for value in values):
            table.add_row(name, *("–" if value is None else f"{value:,.2f}" for value in values))
    return table


def verdict(made: Plan) -> str:
    """One sentence: does such a request fit, and how many do."""
    without, compressed = made.without_compression, made.with_compression
    where = "a GPU" if made.tensor_parallel == 1 else f"a replica of {made.tensor_parallel} GPUs"
    if without.fits:
        times = compressed.requests_per_replica / without.requests_per_replica
        return f"With compression {where} holds {times:.1f} times as many such requests as without."
    need = f"it needs {gib(without.bytes_per_request)} of KV memory, and there are {gib(made.kv_bytes)}"
    if compressed.fits:
        many = f"{compressed.requests_per_replica:,} fit" if compressed.requests_per_replica > 1 else "it does"
        return f"Such a request does not fit {where} without compression: {need}. With it, {many}."
    return f"Such a request fits {where} neither with compression nor without: {need}. Lower the budget or the prompt."


def draw(made: Plan, file: Path) -> None:
    """Left: one request in the memory of a GPU. Right: requests at once against the length of the answer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    memory, capacity = figure.subplots(1, 2)
    figure.suptitle(f"{made.model.name} on GPUs of {gib(made.gpu.memory_bytes)}", fontweight="bold")
    without, compressed = "#b8683c", "#2f7f79"
    sides = (made.without_compression, made.with_compression)
    base = [made.weights_bytes / GIB, made.gpu.overhead_bytes / GIB]
    for at, (side, colour) in enumerate(zip(sides, (without, compressed), strict=True)):
        memory.bar(at, base[0], color="#8a94a6", width=0.55, label="weights" if at == 0 else None)
        memory.bar(at, base[1], bottom=base[0], color="#c3c9d4", width=0.55, label="overhead" if at == 0 else None)
        need = side.bytes_per_request / GIB
        memory.bar(at, need, bottom=sum(base), color=colour, width=0.55)
        memory.annotate(
            f"KV of one request\n{need:.2f} GiB",
            (at, sum(base) + need),
            (0, 6),
            textcoords="offset points",
            ha="center",
            fontsize=9,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )
    usable = made.gpu.memory_bytes * made.gpu.utilization / GIB
    memory.axhline(usable, color="#c0392b", linestyle="--", linewidth=1.2, label=f"vLLM may use {usable:.1f} GiB")
    memory.set_xticks(range(2), _SIDES)
    memory.set_ylabel("GiB on each GPU")
    memory.set_ylim(0, max(usable, sum(base) + sides[0].bytes_per_request / GIB) * 1.35)
    memory.legend(frameon=False, fontsize=9, loc="upper right", ncols=1)
    load = made.load
    lengths = [max(1, load.output_tokens * 2 * step // 64) for step in range(1, 65)]
    for name, colour in zip(_SIDES, (without, compressed), strict=True):
        fitting = [_at(made, length, name).requests_per_replica for length in lengths]
        capacity.step(lengths, fitting, where="mid", color=colour, linewidth=2, label=name)
    capacity.axvline(load.output_tokens, color="#8a94a6", linestyle=":", linewidth=1.2, label="this plan")
    # Short answers fit by the dozen and would flatten the rest.
    capacity.set_ylim(0, 2.5 * max(side.requests_per_replica for side in (*sides, _at(made, lengths[8], _SIDES[0]))))
    capacity.xaxis.set_major_formatter("{x:,.0f}")
    capacity.set_xlabel(f"tokens of the answer (prompt: {load.prompt_tokens:,})")
    capacity.set_ylabel("requests at once on a replica")
    capacity.legend(frameon=False, fontsize=9)
    for axes in (memory, capacity):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)


def _at(made: Plan, output_tokens: int, side: str) -> Side:
    load = Load(made.load.prompt_tokens, output_tokens, made.load.users)
    other = make_plan(made.model, made.gpu, load, made.compression,
                      tensor_parallel=made.tensor_parallel, block_size=made.block_size,
                      max_num_batched_tokens=made.max_num_batched_tokens)  # fmt: skip
    return other.without_compression if side == _SIDES[0] else other.with_compression


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2))
    for column in columns:
        table.add_column(column, justify="left" if not column else "right", no_wrap=bool(column))
    return table


def _requests(side: Side) -> str:
    return _or_never(side, f"[bold green]{side.requests_per_replica:,}[/]")


def _or_never(side: Side, value: str) -> str:
    return value if side.fits else "[red]does not fit[/]"


def gib(size: int) -> str:
    return f"{size / GIB:,.2f} GiB"


def kib(size: int) -> str:
    return f"{size / 1024:,.0f} KiB"
