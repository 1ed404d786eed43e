"""`trifleet status`: the fleet in the terminal, a row per replica, redrawn as the coordinator's picture changes.

Owns the drawing and the pace of compactions, which needs two readings; what it draws is the JSON of `/fleet`.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from deploy.fleet import FleetError
from deploy.keys import KEY_VARIABLE, key_header

REFRESH_SECONDS = 1.0
BAR_CELLS, FEWEST_BAR_CELLS = 30, 8
PARTS = (("held", "cyan"), ("reserved", "yellow"), ("predicted", "magenta"), ("free", "bright_black"))
"""From left to right. Predicted growth and reservations lie in blocks that are free now; `free` is what is left."""

Fleet = dict[str, Any]


def read_fleet(url: str) -> Fleet:
    """Raises `FleetError` where none answers, or not with its state."""
    try:
        response = httpx.get(f"{url}/fleet", headers={"accept": "application/json", **key_header()}, timeout=5)
        if response.status_code in (401, 403):
            raise FleetError(f"The fleet at {url} shows this to an admin key only: set {KEY_VARIABLE} to one.")
        if response.status_code == 503:
            raise FleetError(f"The fleet at {url} does not show its state now: {_message(response)}")
        response.raise_for_status()
        fleet: Fleet = response.json()
    except (httpx.HTTPError, ValueError) as error:
        raise FleetError(f"No fleet answers at {url} ({error}): start it with `trifleet up`.") from None
    return fleet


def _message(refused: httpx.Response) -> str:
    """Who answered knows why: a replica, of the coordinator, or HAProxy, of the replicas."""
    try:
        return str(refused.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):  # of something before the fleet
        return f"{refused.status_code} {refused.reason_phrase}."


def show_status(url: str, console: Console, once: bool, json_path: Path | None) -> None:
    """Draw until Ctrl-C; once where asked to, where a file is wanted, or where the output is no terminal."""
    fleet = read_fleet(url)
    if json_path is not None:
        json_path.write_text(json.dumps(fleet, indent=2) + "\n")
    if once or json_path is not None or not console.is_terminal:
        console.print(draw(url, fleet, {}))
        return
    with Live(draw(url, fleet, {}), console=console, screen=True, auto_refresh=False) as live:
        watch(url, fleet, lambda drawn: live.update(drawn, refresh=True))


def watch(url: str, fleet: Fleet, update: Callable[[RenderableType], None]) -> None:
    """Read and draw for ever; the first reading is there. While none answers the last one stays, and why."""
    read_at = time.monotonic()
    while True:
        time.sleep(REFRESH_SECONDS)
        before, began = fleet, read_at
        try:
            fleet, read_at = read_fleet(url), time.monotonic()
        except FleetError as error:
            update(Group(draw(url, fleet, {}), Text(), Text(str(error), "red")))
        else:
            update(draw(url, fleet, compactions_per_minute(before, fleet, read_at - began)))


def compactions_per_minute(before: Fleet, after: Fleet, seconds: float) -> dict[str, float]:
    """By replica, for those that are in both readings with the same engine."""
    counted = {(r["replica"], r["epoch"]): r["engine"]["compactions"] for r in before["replicas"]}
    return {
        r["replica"]: (r["engine"]["compactions"] - counted[r["replica"], r["epoch"]]) * 60 / seconds
        for r in after["replicas"]
        if (r["replica"], r["epoch"]) in counted
    }


def draw(url: str, fleet: Fleet, pace: dict[str, float]) -> RenderableType:
    """The table; without a pace, as in the first reading, the compactions so far stand in its column."""
    waiting = ", ".join(f"{count} {kind}" for kind, count in fleet["queue_length"].items())
    table = Table(title=f"Fleet at {url}", title_justify="left", box=None, pad_edge=False)
    table.add_column("replica", style="bold", no_wrap=True)
    table.add_column("KV blocks")  # the one that gives way in a narrow terminal
    for heading in ("headroom", "age", "running", "queued", "compactions/min" if pace else "compactions"):
        table.add_column(heading, justify="right", no_wrap=True)
    for replica in fleet["replicas"]:
        engine = replica["engine"]
        compactions = pace.get(replica["replica"]) if pace else engine["compactions"]
        table.add_row(
            _name(replica),
            _Bar(replica),
            f"{replica['headroom_blocks']:,} of {engine['total_blocks']:,}",
            f"{replica['report_age_seconds']:.1f} s",
            f"{engine['running']:,}",
            f"{engine['waiting']:,}",
            "–" if compactions is None else f"{compactions:,.0f}",
        )
    legend = Text.assemble(*((f"█ {part}  ", color) for part, color in PARTS))
    legend.append(f"Waiting for a replica: {waiting}. Placed so far: {fleet['admissions']:,}.", "dim")
    return Group(table, Text(), legend)


class _Bar:
    """As wide as there is room for."""

    def __init__(self, replica: Fleet) -> None:
        self._replica = replica

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield bar(self._replica, min(BAR_CELLS, options.max_width))

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(FEWEST_BAR_CELLS, BAR_CELLS)


def bar(replica: Fleet, cells: int = BAR_CELLS) -> Text:
    """The pool, `cells` wide. Where more is promised than is free, the promises are cut: see the headroom."""
    total = replica["engine"]["total_blocks"]
    text = Text()
    drawn, until = 0, 0
    for part, color in PARTS:
        until = total if part == "free" else min(total, until + max(0, replica[f"{part}_blocks"]))
        end = round(until * cells / total)
        text.append("█" * (end - drawn), color)
        drawn = end
    return text


def _name(replica: Fleet) -> Text:
    if not replica["fresh"]:
        return Text(f"{replica['replica']} silent", "red")
    return Text(f"{replica['replica']} draining", "yellow") if replica["draining"] else Text(replica["replica"])
