"""Writes the tables of docs/*.md from benchmarks/results/*.json: `python -m benchmarks.tables`.

A table stands between `<!-- NAME -->` and `<!-- /NAME -->`; a result file that is missing leaves its table as it is.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parents[1] / "docs"
HTTP_SIDES = {
    "vllm": "vLLM's own server",
    "replica": "one replica, asked at its own port",
    "fleet": "the same replica, behind the fleet's endpoint",
}
HTTP_COLUMNS = (
    "tokens/s",
    "from chunk to chunk, ms (p50 / p99)",
    "first token under load, ms",
    "first token alone, ms",
)


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def spread(figures: dict[str, Any], name: str, digits: int = 2) -> str:
    low, high = figures[f"{name}_quartiles"]
    return f"**{figures[name]:.{digits}f}** ({low:.{digits}f} to {high:.{digits}f})"


def engine(figures: dict[str, Any]) -> str:
    tight, ample = figures["tight"], figures["ample"]
    rows = []
    for side, name in engine_sides(figures).items():
        row = tight[side]
        rows.append(
            [
                name if side == "roomy" else f"tight, {name}",
                f"{row['tokens_per_second']:,.0f}",
                f"{row['milliseconds_per_output_token']:.1f}",
                f"{row['preemptions']}",
                f"{row['peak_blocks_per_request']}",
                f"{row['compaction_share']:.1%}",
            ]
        )
    rows.append(["tight, ours over plain", spread(figures, "ratio_tight"), "", "", "", ""])
    rows.append([f"ours over {engine_sides(figures)['roomy']}", spread(figures, "ratio_roomy"), "", "", "", ""])
    for side in ("plain", "ours"):
        rows.append([f"ample, {side}", f"{ample[side]['tokens_per_second']:,.0f}", "", "", "", ""])
    rows.append(["ample, ours over plain", spread(figures, "ratio_ample", 3), "", "", "", ""])
    heads = ("", "tokens/s", "ms a token", "preemptions", "peak blocks a request", "compaction's share")
    return f"{table(heads, rows)}\n\n{step(figures)}"


def engine_sides(figures: dict[str, Any]) -> dict[str, str]:
    """What the sides of `bench engine` are called."""
    return {"plain": "plain", "ours": "ours", "roomy": f"plain with {figures['roomy_pool_tokens']:,} tokens of memory"}


def step(figures: dict[str, Any]) -> str:
    parts = figures["step_milliseconds"]
    whole = sum(parts.values())
    rows = [[part, f"{took:.2f}", f"{took / whole:.1%}"] for part, took in parts.items()]
    return table(("part of a step", "ms", "share"), [*rows, ["**altogether**", f"**{whole:.2f}**", ""]])


def http(figures: dict[str, Any]) -> str:
    rows = [
        [
            name,
            f"{figures['tokens_per_second'][side]:,.0f}",
            f"{figures['between_chunks_ms_p50'][side]:.1f} / {figures['between_chunks_ms_p99'][side]:.1f}",
            f"{figures['ttft_ms_p50_under_load'][side]:.1f}",
            f"{figures['ttft_ms_p50'][side]:.1f}",
        ]
        for side, name in HTTP_SIDES.items()
    ]
    rows.append(
        ["ratio, added", spread(figures, "ratio_tokens_per_second"), "", "", f"+{figures['added_ttft_ms_p50']:.1f}"]
    )
    return table(("", *HTTP_COLUMNS), rows)


def router(figures: dict[str, Any]) -> str:
    rows = [
        [name, *(f"{figures[f'{figure}_p{percent}_ms']:.1f} ms" for percent in (50, 99))]
        for name, figure in (("a decision", "acquire"), ("age of the report behind it", "report_age"))
    ]
    rows.append(["decisions a second at most", f"{figures['acquires_per_second']:,.0f}", ""])
    return table(("", "50th percentile", "99th percentile"), rows)


def compaction(figures: dict[str, Any]) -> str:
    rows = [
        [
            name,
            f"{figures[size]:,}",
            f"{figures[f'seconds_{name}'] * 1000:.1f}",
            f"{figures[f'seconds_copy_of_{copy}'] * 1000:.1f}",
            f"{figures[f'{name}_over_copy']:.1f}",
        ]
        for name, size, copy in (
            ("score", "score_bytes_read", "score_bytes"),
            ("compact", "bytes_moved", "moved_bytes"),
        )
    ]
    rows.append(["a full slide would move", f"{figures['bytes_moved_full_slide']:,}", "", "", ""])
    return table(("", "bytes", "ms", "a copy of the same bytes, ms", "ratio"), rows)


def eviction(figures: dict[str, Any]) -> str:
    names = {"one_set": "one set for all", "per_head": "a set a head", "per_layer_per_head": "a set a head and layer"}
    rows = [
        [
            f"{kind}, {names[kept]}",
            *(f"{freed[f'blocks_freed_{how}_compaction']} of {figures['blocks_held']}" for how in ("without", "with")),
        ]
        for kind, sets in figures["keys"].items()
        for kept, freed in sets.items()
    ]
    return table(("keys, and what is kept of them", "blocks freed by eviction", "with compaction"), rows)


def trace(figures: dict[str, Any]) -> str:
    took = figures["milliseconds_per_token"]
    rows = [
        [f"{position:,}", f"{plain:.2f}", f"{ours:.2f}"]
        for position, plain, ours in zip(figures["positions"], took["plain"], took["ours"], strict=True)
    ]
    rows.append(["last over first", *(f"**{figures['growth'][side]:.2f}**" for side in ("plain", "ours"))])
    return table(("position", "plain vLLM, ms a token", "ours, ms a token"), rows)


def start(figures: dict[str, Any]) -> str:
    rows = [[part, f"{seconds:.1f}"] for part, seconds in figures["parts"].items()]
    return table(("part", "seconds"), [*rows, ["**altogether**", f"**{figures['seconds']:.1f}**"]])


def sweep(figures: dict[str, Any]) -> str:
    cells = {(c["requests"], c["output_tokens"], c["pool_tokens"]): c for c in figures["cells"]}
    pools = sorted({pool for *_, pool in cells})
    rows = [
        [f"{requests} x {output:,}", *(_cell(cells.get((requests, output, pool))) for pool in pools)]
        for requests, output in sorted({(requests, output) for requests, output, _ in cells})
    ]
    return table(("requests x output tokens", *(f"{pool:,} tokens of KV" for pool in pools)), rows)


def _cell(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return ""
    if "plain" not in cell:
        return f"ours {cell['ours']['tokens_per_second']:,.0f}; plain vLLM does not start"
    plain, ours = (cell[side] for side in ("plain", "ours"))
    speeds = f"{ours['tokens_per_second']:,.0f} to {plain['tokens_per_second']:,.0f}"
    return f"**{cell['ratio']:.2f}** ({speeds}; {ours['preemptions']} and {plain['preemptions']} preempted)"


def chaos(figures: dict[str, Any]) -> str:
    rows = []
    for fault, row in figures["faults"].items():
        recovery = row["recovery_seconds"]
        counts = (row[end] for end in ("failed_silent", "hung", "leaked_blocks", "leaked_reservations"))
        rows.append(
            [
                fault.replace("_", " "),
                f"{row['requests']}",
                f"{row['failed_visible']}",
                f"{row['failed_unstreamed']}",
                "-" if recovery is None else f"{recovery:.1f}",
                *(f"{count}" for count in counts),
                f"{len(row['leftover_processes'])}",
            ]
        )
    heads = (
        "fault", "requests", "failed visibly", "of these, none streamed", "recovery, s", "failed silently", "hung",
        "leaked blocks", "leaked reservations", "processes left",
    )  # fmt: skip
    return table(heads, rows)


def soak(figures: dict[str, Any]) -> str:
    rows = [
        [
            re.sub(r" \(\d+\)$", "", process),
            f"{row['rss_mb_first']:,.0f}",
            f"{row['rss_mb_last']:,.0f}",
            f"{row['rss_mb_most']:,.0f}",
            f"{row['rss_slope_mb_per_hour']:+,.0f}",
            f"{row['open_files_first']} to {row['open_files_last']}",
        ]
        for process, row in figures["processes"].items()
    ]
    return table(("process", "MB when warm", "MB at the end", "MB at most", "MB an hour", "open files"), rows)


def fuzz(figures: dict[str, Any]) -> str:
    return table(("status", "answers"), [[status, f"{count:,}"] for status, count in figures["statuses"].items()])


def quality(figures: dict[str, Any]) -> str:
    tasks = list(figures["full_attention"])
    cells = {(cell["policy"], cell["budget"], cell["task"]): cell for cell in figures["cells"]}
    rows = []
    for policy, budget in dict.fromkeys((policy, budget) for policy, budget, _ in cells):
        of_tasks = [cells[policy, budget, task] for task in tasks]
        low, high = (round(end(cell["reduction"] for cell in of_tasks), 1) for end in (min, max))
        rows.append(
            [
                policy,
                "" if budget is None else f"{budget}",
                *(f"{cell['accuracy']:.1%} ({cell['ci_low']:.0%} to {cell['ci_high']:.0%})" for cell in of_tasks),
                f"{low:.1f}" if low == high else f"{low:.1f} to {high:.1f}",
            ]
        )
    return table(("policy", "budget", *tasks, "fewer peak blocks"), rows)


Tables = dict[str, Callable[[dict[str, Any]], str]]
PAGES: dict[Path, Tables] = {
    DOCS / "performance.md": {
        "engine": engine,
        "engine-bundled": engine,
        "sweep": sweep,
        "http": http,
        "router": router,
        "compaction": compaction,
        "eviction": eviction,
        "trace": trace,
        "start": start,
    },
    DOCS / "reliability.md": {"chaos": chaos, "soak": soak, "fuzz": fuzz},
    DOCS / "quality.md": {"quality": quality, "quality-200": quality, "quality-quick": quality},
}


def machine_of(figures: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {figures[name]}" for name in ("vllm", "ray", "torch") if name in figures)
    load = figures.get("load_average_before")
    cores = f"{figures['cores']} cores" if "cores" in figures else ""
    about = [" of ".join(filter(None, (cores, figures.get("instructions")))), versions]
    about.append("" if load is None else f"load average before the run {load}")
    return "; ".join(part for part in about if part)


def renewed(page: str, tables: Tables, results: Path = RESULTS) -> str:
    """The page with every table that has a result file made anew. Raises ValueError where its markers are missing."""
    for name, render in tables.items():
        file = results / f"{name}.json"
        if not file.exists():
            continue
        figures = json.loads(file.read_text())
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        if not pattern.search(page):
            raise ValueError(
                f"{begin} ... {end} is missing in the page: add it where the table of {file.name} belongs."
            )
        about = machine_of(figures)
        body = f"{begin}\n{render(figures)}\n" + (f"\n{about}\n" if about else "") + end
        page = pattern.sub(body.replace("\\", r"\\"), page)
    return page


if __name__ == "__main__":
    for path, tables in PAGES.items():
        path.write_text(renewed(path.read_text(), tables))
