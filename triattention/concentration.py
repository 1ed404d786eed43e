"""How concentrated a model's queries are: the mean resultant length per head, which says how far statistics reach.

TriAttention stands on queries before RoPE pointing into one direction per band. Their mean resultant length
`R_f = |E q_f| / E|q_f|` is 1 where they all do, and 0 where they point anywhere: there only the norm part of the score
is left. Owns the two figures per head and their picture.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from triattention.statistics import QueryStatistics


@dataclass(frozen=True)
class Concentration:
    """Mean resultant lengths of query heads, fp32 [layers, q_heads], 0 to 1.

    `dominant`: of the band with the largest mean magnitude E|q_f|. `weighted`: mean over the bands, weighted with their
    energy (E|q_f|)^2. `layers`: model layer index of each row.
    """

    layers: tuple[int, ...]
    dominant: Tensor
    weighted: Tensor

    @classmethod
    def of(cls, statistics: QueryStatistics) -> "Concentration":
        magnitude = statistics.query_magnitude
        # A band without any energy has no direction, and no weight either.
        lengths = (statistics.query_mean.abs() / magnitude.clamp_min(torch.finfo(magnitude.dtype).tiny)).clamp_max(1)
        energy = magnitude.square()
        weighted = (lengths * energy).sum(-1) / energy.sum(-1).clamp_min(torch.finfo(magnitude.dtype).tiny)
        dominant = lengths.gather(-1, magnitude.argmax(-1, keepdim=True)).squeeze(-1)
        return cls(statistics.layers, dominant, weighted)

    def plain(self) -> list[dict[str, Any]]:
        """One dict per head, for JSON."""
        return [
            {
                "layer": layer,
                "head": head,
                "dominant": float(self.dominant[row, head]),
                "weighted": float(self.weighted[row, head]),
            }
            for row, layer in enumerate(self.layers)
            for head in range(self.dominant.shape[1])
        ]

    def draw(self, path: Path, title: str) -> None:
        """A heat map of both figures, layers by heads, as PNG; its folder is made."""
        from matplotlib.figure import Figure

        rows, heads = self.dominant.shape
        figure = Figure(figsize=(2.5 + 2 * max(2.0, 0.22 * heads), 1.8 + max(1.2, 0.22 * rows)), layout="constrained")
        figure.suptitle(title)
        parts = ((self.dominant, "dominant band"), (self.weighted, "energy-weighted"))
        for axes, (values, name) in zip(figure.subplots(1, 2, sharey=True), parts, strict=True):
            image = axes.imshow(values.numpy(), vmin=0, vmax=1, cmap="viridis", aspect="auto", interpolation="nearest")
            axes.set(title=name, xlabel="query head", xticks=_ticks(heads))
        axes = figure.axes[0]
        axes.set(ylabel="layer", yticks=_ticks(rows), yticklabels=[str(self.layers[row]) for row in _ticks(rows)])
        figure.colorbar(image, ax=figure.axes, label="mean resultant length")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png", dpi=150)


def _ticks(count: int) -> list[int]:
    """At most about a dozen, from 0 on."""
    return list(range(0, count, max(1, -(-count // 12))))
