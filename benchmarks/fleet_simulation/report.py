"""What is made of the outcomes: figures, a table and a picture. No latency is shown without what was not answered."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Group
from rich.table import Table

from benchmarks.fleet_simulation.routers import WAYS
from benchmarks.fleet_simulation.simulation import ANSWERED, GAVE_UP, REFUSED, Outcome
from benchmarks.fleet_simulation.trace import Scenario, Trace

TAIL = np.geomspace(1.0, 1e-4, 161)
"""Shares of the requests for which the picture shows how long they waited at least."""


def figures_of(outcome: Outcome, trace: Trace, scenario: Scenario) -> dict[str, Any]:
    """One router's figures, per second of the time in which requests arrive. Goodput counts the tokens of answered
    requests once, so neither what was computed again nor what nobody waited for; of it, so much came within the
    scenario's targets. Who got no first token counts as having waited until it was refused or left.
    """
    waited = np.where(np.isnan(outcome.first_token), outcome.finished, outcome.first_token) - trace.arrival
    per_token = (outcome.finished - outcome.first_token) / np.maximum(trace.output - 1, 1)
    answered = outcome.end == ANSWERED
    target = np.where(trace.is_long, scenario.first_token_seconds_long, scenario.first_token_seconds_short)
    good = answered & (waited <= target) & (per_token <= scenario.token_seconds)
    seconds = float(trace.arrival[-1])

    def share(which: NDArray[np.bool_]) -> float:
        return round(float(trace.output[which].sum() / trace.output.sum()), 5)

    classes = {}
    for name, members in (("short", ~trace.is_long), ("long", trace.is_long)):
        paced = per_token[members & answered & (trace.output > 1)] * 1000
        classes[name] = {
            "requests": int(members.sum()),
            "answered": int((members & answered).sum()),
            "within_targets": int((members & good).sum()),
            "first_token_seconds_p50": _percentile(waited[members], 50),
            "first_token_seconds_p99": _percentile(waited[members], 99),
            "token_milliseconds_p50": _percentile(paced, 50),
            "token_milliseconds_p99": _percentile(paced, 99),
            "first_token_seconds_tail": [_percentile(waited[members], 100 * (1 - tail)) for tail in TAIL],
        }
    return {
        "answered": int(answered.sum()),
        "refused": int((outcome.end == REFUSED).sum()),
        "gave_up": int((outcome.end == GAVE_UP).sum()),
        "within_targets": int(good.sum()),
        "preemptions": outcome.preemptions,
        "preempted_requests": int((outcome.preempted > 0).sum()),
        "recomputed_tokens": outcome.recomputed_tokens,
        "goodput_tokens_per_second": round(float(trace.output[answered].sum()) / seconds, 1),
        "within_targets_tokens_per_second": round(float(trace.output[good].sum()) / seconds, 1),
        "token_share": {
            "within targets": share(good),
            "answered late": share(answered & ~good),
            "given up": share(outcome.end == GAVE_UP),
            "refused": share(outcome.end == REFUSED),
        },
        **classes,
        "cpu_seconds": round(outcome.cpu_seconds, 1),
    }


def compared(ways: dict[str, dict[str, Any]], scenario: Scenario) -> dict[str, Any]:
    """The figures of all routers, and ours against the others."""
    ours, two = ways["headroom"], ways["power_of_two"]

    def over_best_other(figure: str) -> float | None:
        return _ratio(ours[figure], max(way[figure] for name, way in ways.items() if name != "headroom"))

    return {
        "scenario": asdict(scenario),
        "preemptions_over_power_of_two": _ratio(ours["preemptions"], two["preemptions"]),
        "short_first_token_p99_over_power_of_two": _ratio(
            ours["short"]["first_token_seconds_p99"], two["short"]["first_token_seconds_p99"]
        ),
        "goodput_over_best_other": over_best_other("goodput_tokens_per_second"),
        "within_targets_over_best_other": over_best_other("within_targets_tokens_per_second"),
        "ways": ways,
    }


def table_of(figures: dict[str, Any]) -> Group:
    """What became of the requests, and how long they waited: two tables, so that they fit 80 columns."""
    scenario = figures["scenario"]
    requests = figures["requests"]
    ends = Table(
        title=f"{figures['replicas']:,} simulated replicas, {requests:,} requests, scenario {scenario['name']}",
        title_justify="left",
        caption="Tokens per second of answered requests, each token counted once. Within targets: the first token in "
        f"{scenario['first_token_seconds_short']:g} s (short) or {scenario['first_token_seconds_long']:g} s (long) "
        f"and at most {scenario['token_seconds'] * 1000:g} ms a token.",
        caption_justify="left",
    )
    waits = Table(
        title="Seconds to the first token, milliseconds a token: p50 / p99",
        title_justify="left",
        caption="Who got no first token counts as waiting until refused or gone. "
        f"Wall time {figures['wall_seconds']:.0f} s.",
        caption_justify="left",
    )
    for table, headings in (
        (ends, ("goodput", "in targets", "refused", "gave up", "preempted")),
        (waits, ("short: first", "a token", "long: first", "a token")),
    ):
        table.add_column("")
        for heading in headings:
            table.add_column(heading, justify="right", no_wrap=True)
    for way in WAYS:
        if way.name not in figures["ways"]:
            continue
        of = figures["ways"][way.name]
        style = "bold" if way.name == "headroom" else None
        ends.add_row(
            way.title,
            f"{of['goodput_tokens_per_second']:,.0f}",
            f"{of['within_targets_tokens_per_second']:,.0f}",
            f"{of['refused'] / requests:.2%}",
            f"{of['gave_up'] / requests:.2%}",
            f"{of['preemptions']:,}",
            style=style,
        )
        cells = []
        for kind in (of["short"], of["long"]):
            cells.append(f"{kind['first_token_seconds_p50']:.2f} / {kind['first_token_seconds_p99']:.2f}")
            cells.append(f"{kind['token_milliseconds_p50']:.0f} / {kind['token_milliseconds_p99']:.0f}")
        waits.add_row(way.title, *cells, style=style)
    return Group(ends, waits)


def plot(figures: dict[str, Any], path: Path) -> None:
    """What became of the tokens, preemptions, and how long requests waited for their first token."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    ways = [way for way in WAYS if way.name in figures["ways"]]
    of = [figures["ways"][way.name] for way in ways]
    colors = ["#0b6e4f", "#d1495b", "#8d6a9f", "#edae49", "#c97b1a", "#5b7db1"]
    figure, ((shares, preemptions), (short, long)) = pyplot.subplots(2, 2, figsize=(12, 7.5), layout="constrained")
    scenario = figures["scenario"]
    figure.suptitle(
        f"{figures['replicas']:,} simulated replicas, {figures['requests']:,} requests, "
        f"scenario “{scenario['name']}” (mean load {scenario['load']:g})"
    )
    places = range(len(ways))
    titles = [way.title for way in ways]

    left = np.zeros(len(ways))
    kinds = ("within targets", "answered late", "given up", "refused")
    for kind, color in zip(kinds, ("#0b6e4f", "#edae49", "#d1495b", "#9a9a9a"), strict=True):
        values = np.array([one["token_share"][kind] for one in of]) * 100
        shares.barh(places, values, left=left, color=color, label=kind)
        left += values
    shares.set(xlabel="% of the tokens asked for", xlim=(0, 100), title="What became of them")
    shares.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=4, fontsize=8, frameon=False)
    counts = [one["preemptions"] for one in of]
    preemptions.barh(places, counts, color=colors)
    for place, number in enumerate(counts):
        preemptions.annotate(f" {number:,}", (number, place), va="center", fontsize=9)
    preemptions.set(xlabel="preemptions", title="Lost their memory, computed anew")
    preemptions.margins(x=0.18)
    preemptions.xaxis.set_major_locator(ticker.MaxNLocator(5))
    preemptions.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.0f}"))
    for axes in (shares, preemptions):
        axes.set_yticks(places, titles)
        axes.invert_yaxis()
    for axes, name in ((short, "short"), (long, "long")):
        for way, one, color in zip(ways, of, colors, strict=True):
            tail = one[name]["first_token_seconds_tail"]
            axes.plot(tail, TAIL * 100, color=color, label=way.title, linewidth=2.2 if way.name == "headroom" else 1.4)
        axes.axvline(scenario[f"first_token_seconds_{name}"], color="grey", linestyle=":", linewidth=1)
        axes.set(
            xscale="log", yscale="log", xlabel="seconds to the first token (dotted: target)",
            ylabel=f"% of the {name} requests that wait longer", title=f"First token, {name} requests",
        )  # fmt: skip
        axes.axhline(1, color="grey", linewidth=0.6)
        axes.grid(alpha=0.3)
    figure.legend(*short.get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=6, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _percentile(values: NDArray[np.float64], percent: float) -> float:
    return round(float(np.percentile(values, percent)), 4) if len(values) else float("nan")


def _ratio(a: float, b: float) -> float | None:
    """None where both are nothing to compare by."""
    return round(a / b, 4) if b else None
