"""What running requests are expected to hold later: most of them end long before their bound is reached together.

All sequences of a replica write a token a step, so "later" is the same number of tokens for each. At every one of
`HORIZONS` tokens from now a request holds its blocks with the probability that it still runs, by the lengths of answers
that were seen lately, and never more than its bound:

    a request of prompt 64, bound 8 blocks of 32, that has written 32 tokens; half of those seen ended within 160

    tokens from now          0     64    128    ...  never ends
    blocks if it runs        3      5      7            8
    still runs               1     .8     .5          .01 (one more than was seen outlives them all)
    expected                 3      4    3.5          .08

Sums of means and variances over a replica's requests say what it takes to have room for them at every horizon. While
nothing is known of a request or of its like, it counts as never ending: its whole bound is booked.
"""

from collections import deque
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

NEVER_ENDS = 1 << 40
HORIZONS = np.array([0, 128, 256, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192, 16384, NEVER_ENDS])
"""Tokens from now."""

UNKNOWN = 0
"""The class of requests of which nothing is known."""
CLASSES = 41
"""Requests are alike if they allow about as many output tokens: up to the same power of two."""
REMEMBERED = 1000
"""Answers per class: about a minute of a large fleet, an hour of a small one."""
_RESORT = 50
"""So many new ones go unnoticed at most."""

Column = NDArray[np.int64]
Matrix = NDArray[np.float64]


def length_class(output_tokens: int) -> int:
    """The class of a request that allows so many output tokens."""
    return 1 + max(1, output_tokens - 1).bit_length()


class Lengths:
    """How many tokens answers had, by class."""

    def __init__(self) -> None:
        self._seen: dict[int, deque[int]] = {}
        self._sorted = np.zeros(0, np.int64)
        """All that were seen, each plus its class times NEVER_ENDS: one search finds places in any class."""
        self._end = np.zeros(CLASSES, np.int64)
        """Where each class ends in `_sorted`."""
        self._unnoticed = 0

    def note(self, of_class: int, output_tokens: int) -> None:
        """A request of this class has ended after so many tokens, for whatever reason."""
        if of_class == UNKNOWN:
            return
        self._seen.setdefault(of_class, deque(maxlen=REMEMBERED)).append(output_tokens)
        self._unnoticed += 1

    def survival(self, classes: Column, written: Column) -> Matrix:
        """The probability [requests, horizons] that each still runs at each horizon, of one that has written so much.

        One more than was seen outlives them all: so nothing is certain to end, least of all where little was seen.
        """
        if self._unnoticed >= _RESORT:
            self._sort()
        later = np.minimum(written[:, None] + HORIZONS, NEVER_ENDS - 1)
        base = (classes * NEVER_ENDS)[:, None]
        longer = self._end[classes][:, None] - np.searchsorted(self._sorted, base + later, side="right") + 1.0
        return longer / longer[:, :1]

    def _sort(self) -> None:
        self._unnoticed = 0
        shifted = [np.sort(np.array(seen)) + of_class * NEVER_ENDS for of_class, seen in sorted(self._seen.items())]
        self._sorted = np.concatenate(shifted)
        self._end = np.searchsorted(self._sorted, np.arange(1, CLASSES + 1) * NEVER_ENDS)


@dataclass(frozen=True)
class Use:
    """Blocks that requests may hold at each of HORIZONS."""

    mean: Matrix
    variance: Matrix
    most: Matrix
    """If none of them ends."""

    @classmethod
    def always(cls, blocks: float) -> Self:
        """Of what holds so many blocks for ever."""
        held = np.full(len(HORIZONS), float(blocks))
        return cls(held, np.zeros(len(HORIZONS)), held)

    def __add__(self, other: Self) -> Self:
        return type(self)(self.mean + other.mean, self.variance + other.variance, self.most + other.most)

    def sum(self) -> Self:
        """Of all requests together: [horizons] of [requests, horizons]."""
        return type(self)(self.mean.sum(axis=0), self.variance.sum(axis=0), self.most.sum(axis=0))

    def row(self, number: int) -> Self:
        """Of one request: [horizons] of [requests, horizons]."""
        return type(self)(self.mean[number], self.variance[number], self.most[number])

    def to_keep(self, margin: float) -> Matrix:
        """Blocks to keep for it: so many standard deviations more than the mean, and never more than the most."""
        return np.minimum(self.mean + margin * np.sqrt(self.variance), self.most)


@dataclass(frozen=True)
class Requests:
    """Requests as aligned columns."""

    classes: Column
    prompt_tokens: Column
    written_tokens: Column
    """By all sequences together."""
    sequences: Column
    held_blocks: Column
    """Now; -1 where that is not known."""
    bound_blocks: Column

    @classmethod
    def of(cls, rows: list[tuple[int, int, int, int, int, int]]) -> Self:
        """From rows of these fields."""
        return cls(*np.array(rows, np.int64).reshape(-1, 6).T)


def expected_use(requests: Requests, block_size: int | Column, lengths: Lengths) -> Use:
    """Of each request: [requests, horizons]. A block size for all, or one for each [requests, 1]."""
    written = requests.written_tokens // requests.sequences
    tokens = (requests.prompt_tokens + written)[:, None] + HORIZONS
    # Never less than now: it may hold more than its bound, as with prefixes shared otherwise than thought.
    blocks = -(-tokens // block_size) * requests.sequences[:, None]
    blocks = np.maximum(np.minimum(blocks, requests.bound_blocks[:, None]), requests.held_blocks[:, None])
    blocks[:, 0] = np.where(requests.held_blocks < 0, blocks[:, 0], requests.held_blocks)
    runs = lengths.survival(requests.classes, written)
    mean = blocks * runs
    return Use(mean, mean * blocks * (1 - runs), blocks.astype(np.float64))
