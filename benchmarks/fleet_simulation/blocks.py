"""KV blocks of a simulated replica's running requests: integers in a table, any number of steps at once.

A row is one running request. A step is one forward pass; during step `JOIN` the last prompt token is computed and the
first token sampled, from then on a token a step until `END`. The table of one request, compacted, as vLLM holds it:

    [pinned prompt blocks] [null blocks up to `start`] [live blocks from `start` on]

`tests/unit/test_fleet_simulation.py` holds it against `triattention.bounds`, `tests/engine/test_simulated_replica.py`
against the engine's KV manager, step by step.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

JOIN, END, TOKENS, PINNED, START, PREFILL, BOUND = range(7)
"""Columns: step of its first token; step of its last; tokens with slots when it joins; pinned blocks; first live block
when it joins; blocks held while its prompt is computed; most blocks that it may come to hold."""
COLUMNS = 7

NEVER = 1 << 60
STEPS_AT_ONCE = 64

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Shape:
    """What all requests of a replica have in common, in tokens."""

    block: int
    limit: int
    """Budget and interval: with so many processed live tokens a compaction is due."""
    period: int
    """The interval, whole blocks: by so much a compaction moves the start, so the blocks held are a sawtooth."""

    def held(self, rows: Rows, steps: Rows) -> Rows:
        """Blocks held [rows, steps] by each request during each of these steps."""
        join, start = rows[:, JOIN, None], rows[:, START, None]
        tokens = rows[:, TOKENS, None] + steps - join
        compactions = (tokens - 1 - start * self.block - self.limit) // self.period + 1
        start = start + np.maximum(compactions, 0) * (self.period // self.block)
        decoding = rows[:, PINNED, None] - (-tokens // self.block) - start
        return np.where(steps <= join, rows[:, PREFILL, None], decoding)

    def held_in(self, rows: Rows, step: int) -> Rows:
        """Blocks held [rows] during one step."""
        return self.held(rows, np.array([step]))[:, 0]

    def next_turn(self, rows: Rows, step: int, last: int, total: int, wanted: int) -> int:
        """The first step after `step` and up to `last` that overfills the pool or leaves the `wanted` blocks free.

        `wanted` is negative when nobody waits for blocks. NEVER if there is no such step.
        """
        if wanted < 0 and rows[:, BOUND].sum() <= total:
            return NEVER
        for begin in range(step + 1, last + 1, STEPS_AT_ONCE):
            steps = np.arange(begin, min(begin + STEPS_AT_ONCE, last + 1))
            held = self.held(rows, steps).sum(axis=0)
            turns = held > total
            if wanted >= 0:
                turns |= held + wanted <= total
            if turns.any():
                return int(steps[turns.argmax()])
        return NEVER
