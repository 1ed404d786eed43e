"""From replies to figures: accuracy with its interval, reduction, the table, the JSON and the two plots."""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.quality.engine import EngineRun

FULL = "full"
"""The policy's name where nothing is compacted."""
TRIATTENTION = "triattention"


@dataclass(frozen=True)
class Cell:
    """One task under one policy and budget."""

    task: str
    policy: str
    budget: int | None
    """Tokens per KV head behind the pinned prompt; None with full attention."""
    n: int
    accuracy: float
    ci_low: float
    ci_high: float
    peak_blocks: int
    """Most KV blocks that any one request of the cell held."""
    reduction: float
    """Full attention's peak_blocks over this cell's, on the same requests."""


@dataclass(frozen=True)
class EngineFigures:
    """One engine, which served the requests of all tasks together."""

    policy: str
    budget: int | None
    freed_blocks: int
    preemptions: int
    tokens_per_second: float
    bytes_per_block: int


def wilson(right: int, n: int) -> tuple[float, float]:
    """The 95 % score interval of a share (Wilson 1927)."""
    z = 1.959963984540054
    share, spread = right / n, z * z / n
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    return max(0.0, middle - half), min(1.0, middle + half)


@dataclass(frozen=True)
class Report:
    """All cells, task by task in the order in which they were run; the first of a task is full attention's."""

    model: str
    cells: list[Cell]
    engines: list[EngineFigures]

    @classmethod
    def of(cls, model: str, runs: Iterable[tuple[str, int | None, EngineRun]]) -> "Report":
        """From (policy, budget, run), the first of which is full attention's."""
        cells: list[Cell] = []
        engines: list[EngineFigures] = []
        full: dict[str, int] = {}
        for policy, budget, run in runs:
            for task in dict.fromkeys(reply.problem.task for reply in run.replies):
                replies = [reply for reply in run.replies if reply.problem.task == task]
                right, n = sum(reply.correct for reply in replies), len(replies)
                peak = max(reply.peak_blocks for reply in replies)
                reduction = full.setdefault(task, peak) / peak
                cells.append(Cell(task, policy, budget, n, right / n, *wilson(right, n), peak, reduction))
            engines.append(
                EngineFigures(
                    policy,
                    budget,
                    run.freed_blocks,
                    run.preemptions,
                    run.tokens_per_second,
                    run.bytes_per_block,
                )
            )
        return cls(model, cells, engines)

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(cell.task for cell in self.cells))

    def full_attention(self, task: str) -> Cell:
        return next(cell for cell in self.cells if cell.task == task and cell.policy == FULL)

    def reduction_at_parity(self, task: str) -> float:
        """The largest reduction at which TriAttention's interval still overlaps full attention's; 1 if none does."""
        full = self.full_attention(task)
        even = [
            cell.reduction
            for cell in self.cells
            if cell.task == task
            and cell.policy.split(":")[0] == TRIATTENTION
            and cell.ci_high >= full.ci_low
            and cell.ci_low <= full.ci_high
        ]
        return max(even, default=1.0)

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "cells": [asdict(cell) for cell in self.cells],
            "full_attention": {task: self.full_attention(task).accuracy for task in self.tasks},
            "reduction_at_parity": {task: self.reduction_at_parity(task) for task in self.tasks},
            "engines": [asdict(engine) for engine in self.engines],
        }

    def write_json(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_json(), indent=2) + "\n")

    def table(self) -> Table:
        table = Table(title=f"Answers of {self.model}", title_justify="left", box=None, pad_edge=False)
        for heading in ("task", "policy", "budget"):
            table.add_column(heading, justify="right" if heading == "budget" else "left")
        for heading in ("right", "95 % interval", "peak", "reduction", "freed", "tokens/s"):
            table.add_column(heading, justify="right", no_wrap=True)
        engines = {(engine.policy, engine.budget): engine for engine in self.engines}
        for task in self.tasks:
            for cell in (cell for cell in self.cells if cell.task == task):
                engine = engines[cell.policy, cell.budget]
                table.add_row(
                    task,
                    cell.policy,
                    "" if cell.budget is None else f"{cell.budget:,}",
                    f"{cell.accuracy:.1%} of {cell.n}",
                    f"{cell.ci_low:.1%} – {cell.ci_high:.1%}",
                    f"{cell.peak_blocks:,}",
                    f"{cell.reduction:.1f}x",
                    f"{engine.freed_blocks:,}",
                    f"{engine.tokens_per_second:,.0f}",
                )
            table.add_section()
        table.caption = (
            "Peak: most KV blocks of one request. Freed blocks and tokens per second are the engine's, "
            "which serves all tasks together."
        )
        if any(cell.policy.split(":")[0] == TRIATTENTION for cell in self.cells):
            reductions = ", ".join(f"{task} {self.reduction_at_parity(task):.1f}x" for task in self.tasks)
            table.caption += f" Largest reduction at which triattention is level with full attention: {reductions}."
        table.caption_justify = "left"
        return table

    def plot(self, folder: Path) -> list[Path]:
        """Accuracy against budget and against physical KV memory, PNG and SVG each; the paths written."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        folder.mkdir(parents=True, exist_ok=True)
        bytes_per_block = self.engines[0].bytes_per_block
        written = []
        for name, label in (("budget", "budget, tokens per KV head"), ("memory", "peak KV memory of a request, KiB")):
            figure, axes = pyplot.subplots(
                1,
                len(self.tasks),
                figsize=(4.6 * len(self.tasks), 4.2),
                sharey=True,
                squeeze=False,
                layout="constrained",
            )
            for axis, task in zip(axes[0], self.tasks, strict=True):
                full = self.full_attention(task)
                axis.axhspan(full.ci_low, full.ci_high, color="0.9")
                axis.axhline(full.accuracy, color="0.4", linewidth=1, label="full attention")
                policies = dict.fromkeys(cell.policy for cell in self.cells if cell.policy != FULL)
                for number, policy in enumerate(policies):
                    cells = [cell for cell in self.cells if cell.task == task and cell.policy == policy]
                    cells.sort(key=lambda cell: cell.budget or 0)
                    places = [
                        cell.budget or 0 if name == "budget" else cell.peak_blocks * bytes_per_block / 1024
                        for cell in cells
                    ]
                    # Side by side, or the intervals would hide each other.
                    shift = 1 + 0.015 * (number - len(policies) / 2)
                    axis.errorbar(
                        [place * shift for place in places],
                        [cell.accuracy for cell in cells],
                        yerr=[
                            [max(0.0, cell.accuracy - cell.ci_low) for cell in cells],
                            [max(0.0, cell.ci_high - cell.accuracy) for cell in cells],
                        ],
                        marker="osDv^<>pPX*"[number % 11],
                        markersize=5,
                        linewidth=1.2,
                        capsize=2,
                        label=policy,
                    )
                if name == "memory":
                    place = full.peak_blocks * bytes_per_block / 1024
                    axis.plot([place], [full.accuracy], marker="o", color="0.3", linestyle="none")
                axis.set_xscale("log", base=2)
                axis.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda x, _: f"{x:,.0f}"))
                axis.set_title(f"{task} ({full.n} instances)")
                axis.set_xlabel(label)
                axis.set_ylim(-0.03, 1.03)
                axis.spines[["top", "right"]].set_visible(False)
            axes[0][0].set_ylabel("right answers, 95 % interval")
            axes[0][0].yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
            handles, labels = axes[0][0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
            for kind in ("png", "svg"):
                path = folder / f"accuracy-by-{name}.{kind}"
                figure.savefig(path, dpi=150)
                written.append(path)
            pyplot.close(figure)
        return written
