"""The replicas as a table of columns, one row each: what placement compares, in one numpy operation for all of them.

Written by the ledger alone, after every change to a replica; holds nothing that the ledger does not know better.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deploy.growth import HORIZONS, Matrix, Use
from deploy.messages import CapacityReport, ReplicaLimits

_ROW = np.dtype(
    [
        ("kind", np.intp),
        ("usable", np.int64),
        ("headroom", np.int64),
        ("requests", np.int64),
        ("heard_at", np.float64),
        ("node", np.intp),
        ("expected", np.float64, len(HORIZONS)),
        ("variance", np.float64, len(HORIZONS)),
        ("most", np.float64, len(HORIZONS)),
    ]
)
UNKNOWN_NODE = -2
# Sums of fractions of blocks are this exact; what is whole must not become one block more.
ROUNDING = 1e-6


@dataclass(frozen=True)
class ReplicaKind:
    """All that a request's need in blocks depends on: replicas of one kind need the same, whatever their pools."""

    limits: ReplicaLimits
    block_size: int
    in_flight_tokens: int

    @property
    def reserves_growth(self) -> bool:
        """Its engine takes a request only if all of its bound is free: to book less would make it wait there."""
        return self.limits.compression is not None and self.limits.compression.reserve_growth

    @classmethod
    def of(cls, report: CapacityReport) -> "ReplicaKind":
        return cls(report.limits, report.engine.block_size, report.engine.in_flight_tokens)


class ReplicaTable:
    """Columns are aligned with `names`; blocks are each replica's own, times in seconds."""

    names: list[str]
    row_of: dict[str, int]
    kind: NDArray[np.intp]
    """Index into `kinds`."""
    usable: NDArray[np.int64]
    """Blocks that one request can have at most: all of the pool but the watermark."""
    headroom: NDArray[np.int64]
    requests: NDArray[np.int64]
    """Running, waiting, and booked but not yet seen."""
    heard_at: NDArray[np.float64]
    """When it last reported; -inf for one that gets nothing new, whatever it reported."""

    node: NDArray[np.intp]
    """Number of the node in `nodes`."""
    expected: Matrix
    """Blocks in use at each of `growth.HORIZONS`, as expected: the mean,"""
    variance: Matrix
    """its variance,"""
    most: Matrix
    """and what it is if nothing ends."""

    def __init__(self) -> None:
        self.nodes: dict[str, int] = {}
        """Every node that was ever seen, by name; unknown ones have no name and no number here."""
        self.kinds: list[ReplicaKind] = []
        """Every kind that was ever seen: there are as many as engine settings, not as replicas."""
        self.largest: list[tuple[ReplicaKind, int]] = []
        """The kinds that are there now, each with the usable blocks of its largest pool."""
        self._set([], np.zeros(0, _ROW))

    def __len__(self) -> int:
        return len(self.names)

    def add(self, replica: str) -> None:
        self._set([*self.names, replica], np.append(self._rows, np.zeros(1, _ROW)))

    def remove(self, replica: str) -> None:
        row = self.row_of[replica]
        self._set(self.names[:row] + self.names[row + 1 :], np.delete(self._rows, row))
        self._find_largest()

    def set_kind(self, replica: str, kind: ReplicaKind, usable_blocks: int, node: str) -> None:
        """What holds for as long as an engine lives."""
        self.node[self.row_of[replica]] = self.nodes.setdefault(node, len(self.nodes)) if node else UNKNOWN_NODE
        if kind not in self.kinds:
            self.kinds.append(kind)
        row = self.row_of[replica]
        self.kind[row] = self.kinds.index(kind)
        self.usable[row] = usable_blocks
        self._find_largest()

    def update(self, replica: str, headroom_blocks: int, requests: int, expected: Use) -> None:
        row = self.row_of[replica]
        self.headroom[row] = headroom_blocks
        self.requests[row] = requests
        self.expected[row] = expected.mean
        self.variance[row] = expected.variance
        self.most[row] = expected.most

    def set_heard_at(self, replica: str, heard_at: float) -> None:
        self.heard_at[self.row_of[replica]] = heard_at

    def fits(self, rows: slice, of_kind: Use, margin: float) -> NDArray[np.bool_]:
        """Which of the rows have room, at every horizon, for a request that is expected to use so much on each of
        `kinds` ([kinds, horizons])."""
        kind = self.kind[rows]
        # Room for the most that it may ever use is room enough; sums over horizons are for those that lack it.
        fits: NDArray[np.bool_] = self.headroom[rows] >= of_kind.most.max(axis=1)[kind]
        near = np.flatnonzero(~fits)
        kind = kind[near]
        here = Use(self.expected[rows][near], self.variance[rows][near], self.most[rows][near])
        together = here + Use(of_kind.mean[kind], of_kind.variance[kind], of_kind.most[kind])
        fits[near] = together.to_keep(margin).max(axis=1) <= self.usable[rows][near] + ROUNDING
        return fits

    def _set(self, names: list[str], rows: NDArray[np.void]) -> None:
        self.names = names
        self.row_of = {name: row for row, name in enumerate(names)}
        self._rows = rows
        # Views: writing to a column writes to the table.
        self.kind, self.usable, self.headroom = rows["kind"], rows["usable"], rows["headroom"]
        self.requests, self.heard_at, self.node = rows["requests"], rows["heard_at"], rows["node"]
        self.expected, self.variance, self.most = rows["expected"], rows["variance"], rows["most"]

    def _find_largest(self) -> None:
        self.largest = [
            (self.kinds[kind], int(self.usable[self.kind == kind].max())) for kind in np.unique(self.kind).tolist()
        ]
