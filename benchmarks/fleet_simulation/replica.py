"""One simulated vLLM engine: continuous batching, a block pool, compaction, preemption and recomputing.

The model, which the docs repeat:

- A step takes `Clock.step + Clock.sequence * running sequences`; a step that also computes prompt tokens takes
  `Clock.prompt_token` more for each. Every running request gets one token a step, so between two changes of the batch
  all ends and block crossings follow from integers: nothing is simulated token by token.
- Waiting requests are taken in order at the end of a step while there is a slot of `max_num_seqs` and their prompt's
  blocks are free (vLLM's `scheduler_reserve_full_isl`); with `reserve_growth`, while every running one could still grow
  to its bound. A prompt of n tokens takes ceil(n / max_num_batched_tokens) steps.
- When a step needs more blocks than there are, the last request that was admitted loses all of its own and goes back to
  the head of the queue; no request is admitted in that step. It is computed anew from its prompt and what it has
  written, all at the price of prompt tokens, and needs the blocks of a chunk on top of its bound meanwhile.
- Left out: prefix caching, tokens in flight of asynchronous scheduling (one step of one token), time on the network.
"""

import math
from collections import deque
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from benchmarks.fleet_simulation.blocks import BOUND, COLUMNS, END, JOIN, PINNED, PREFILL, START, TOKENS, Rows, Shape
from benchmarks.fleet_simulation.trace import Clock, Pool
from triattention.bounds import blocks_bound, cdiv

IN_FLIGHT_TOKENS = 1


@dataclass(slots=True)
class Job:
    """One request at a replica: what it asks for, and what it has got."""

    number: int
    arrival: float
    prompt: int
    output: int
    max_tokens: int
    generated: int = 0
    first_token_at: float | None = None
    preemptions: int = 0


class Listener(Protocol):
    def finished(self, job: Job, now: float) -> None: ...

    def gave_up(self, job: Job, now: float) -> None: ...


class SimulatedReplica:
    """`wake` is when it wants `turn` called next; whoever owns the clock obeys, and calls `arrive` in between."""

    def __init__(self, pool: Pool, clock: Clock, patience_seconds: float, reserve_growth: bool, listener: Listener):
        config = pool.compression
        assert config.interval % pool.block_size == 0, "a compaction frees whole blocks, always as many"
        self.pool = pool
        self.clock = clock
        self.patience_seconds = patience_seconds
        self.reserve_growth = reserve_growth
        self.listener = listener
        self.jobs: list[Job] = []
        """Running, in order of admission; row i of the table is job i."""
        self.waiting: deque[Job] = deque()
        self.preemptions = 0
        self.recomputed_tokens = 0
        self.wake: float | None = None
        self._table = np.zeros((pool.max_num_seqs, COLUMNS), np.int64)
        self._shape = Shape(pool.block_size, config.budget + config.interval, config.interval)
        self._without_first_token: list[int] = []
        """Rows' jobs by number that have not reached JOIN yet."""
        # Step `_step` ended at `_ended_at`; the next one takes `_stall` longer than `_step_seconds`.
        self._step = 0
        self._ended_at = 0.0
        self._stall = 0.0
        self._step_seconds = clock.step
        self._wake_step = 0

    @property
    def requests(self) -> int:
        return len(self.jobs) + len(self.waiting)

    @property
    def _rows(self) -> Rows:
        return self._table[: len(self.jobs)]

    def used_blocks(self, now: float) -> int:
        return self._held_in(self._step_after(now))

    def held_blocks(self, now: float) -> tuple[dict[str, int], int]:
        """As a capacity report has it: blocks by request, 0 for those that wait; and their sum."""
        each = self._shape.held_in(self._rows, self._step_after(now)).tolist()
        held = {str(job.number): 0 for job in self.waiting}
        held.update(zip((str(job.number) for job in self.jobs), each, strict=True))
        return held, sum(each)

    def written_tokens(self, now: float) -> dict[str, int]:
        """By request, of those that run."""
        joined = self._step_after(now) - self._rows[:, JOIN]
        return {
            str(job.number): job.generated + max(0, steps)
            for job, steps in zip(self.jobs, joined.tolist(), strict=True)
        }

    def arrive(self, job: Job, now: float) -> None:
        self.waiting.append(job)
        if not self.jobs:
            self._ended_at = now
            self._stall = 0.0
            self._wake_at(self._step)
        else:
            self._wake_at(min(self._wake_step, self._step_after(now)))

    def turn(self) -> None:
        """What happens at the end of the step that `wake` was about, before the next begins."""
        assert self.wake is not None
        step, now = self._wake_step, self.wake
        self._note_first_tokens(step)
        self._step, self._ended_at, self._stall = step, now, 0.0
        self._finish(step, now)
        was_short_of_blocks = self._preempt(step)
        wanted = -1 if was_short_of_blocks else self._admit(step, now)
        running = len(self.jobs)
        if not running:
            self.wake = None
            return
        self._step_seconds = self.clock.step + self.clock.sequence * running
        last = int(self._rows[:, END].min())
        if self.waiting and self.waiting[0].first_token_at is None and math.isfinite(self.patience_seconds):
            # When the first one leaves, the next may fit.
            last = min(last, self._step_after(self.waiting[0].arrival + self.patience_seconds))
        if was_short_of_blocks and self.waiting:
            self._wake_at(step + 1)
            return
        # Step `turn` is scheduled at the end of the one before it.
        turn = self._shape.next_turn(self._rows, step + 1, last, self.pool.total_blocks, wanted)
        self._wake_at(min(last, turn - 1))

    # -- the parts of a turn -----------------------------------------------------------------------------

    def _note_first_tokens(self, step: int) -> None:
        if not self._without_first_token:
            return
        by_number = {job.number: row for row, job in enumerate(self.jobs)}
        late = []
        for number in self._without_first_token:
            row = by_number.get(number)
            if row is None:
                continue
            joined = int(self._rows[row, JOIN])
            if joined > step:
                late.append(number)
            elif self.jobs[row].first_token_at is None:
                self.jobs[row].first_token_at = self._time_of(joined)
        self._without_first_token = late

    def _finish(self, step: int, now: float) -> None:
        for row in np.flatnonzero(self._rows[:, END] <= step)[::-1].tolist():
            self.listener.finished(self._take_out(row), now)

    def _preempt(self, step: int) -> bool:
        if self._rows[:, BOUND].sum() <= self.pool.total_blocks:
            return False
        preempted = False
        while self._held_in(step + 1) > self.pool.total_blocks:
            row = len(self.jobs) - 1
            written = step - int(self._rows[row, JOIN]) + 1
            job = self._take_out(row)
            job.generated += max(0, written)
            job.preemptions += 1
            self.preemptions += 1
            self.waiting.appendleft(job)
            preempted = True
        return preempted

    def _admit(self, step: int, now: float) -> int:
        """Blocks that the first one who waits for blocks needs; -1 if nobody waits for those."""
        while self.waiting:
            job = self.waiting[0]
            if job.first_token_at is None and now - job.arrival > self.patience_seconds:
                self.waiting.popleft()
                self.listener.gave_up(job, job.arrival + self.patience_seconds)
                continue
            if len(self.jobs) == self.pool.max_num_seqs:
                return -1
            row = self._row_for(job, step)
            if self.reserve_growth:
                promised = int(self._rows[:, BOUND].sum())
                if promised + row[BOUND] > self.pool.total_blocks:
                    return -1  # only an end can change that
            else:
                if self._held_in(step + 1) + row[PREFILL] > self.pool.total_blocks:
                    return row[PREFILL]
            self.waiting.popleft()
            self._table[len(self.jobs)] = row
            self.jobs.append(job)
            if job.first_token_at is None:
                self._without_first_token.append(job.number)
            self._stall += self.clock.prompt_token * row[TOKENS]
            if job.preemptions:
                self.recomputed_tokens += row[TOKENS]
        return -1

    def _row_for(self, job: Job, step: int) -> list[int]:
        pool, config = self.pool, self.pool.compression
        tokens = job.prompt + job.generated
        pinned = cdiv(config.pinned_tokens(job.prompt), pool.block_size)
        in_flight = pool.max_num_batched_tokens if job.preemptions else IN_FLIGHT_TOKENS
        bound = blocks_bound(job.prompt, job.prompt + job.max_tokens, pool.block_size, config, in_flight)
        start = pinned
        if job.generated and tokens - 1 - pinned * pool.block_size >= config.budget + config.interval:
            start = (tokens - 1 - config.budget) // pool.block_size
        join = step + cdiv(tokens, pool.max_num_batched_tokens)
        row = [0] * COLUMNS
        row[JOIN], row[END] = join, join + job.output - job.generated - 1
        row[TOKENS], row[PINNED], row[START] = tokens, pinned, start
        row[PREFILL], row[BOUND] = min(cdiv(tokens, pool.block_size), bound), bound
        return row

    def _take_out(self, row: int) -> Job:
        self._table[row : len(self.jobs) - 1] = self._table[row + 1 : len(self.jobs)]
        return self.jobs.pop(row)

    # -- its clock ---------------------------------------------------------------------------------------

    def _held_in(self, step: int) -> int:
        return int(self._shape.held_in(self._rows, step).sum())

    def _time_of(self, step: int) -> float:
        """When a step ends, as things are."""
        if step <= self._step:
            return self._ended_at
        return self._ended_at + self._stall + (step - self._step) * self._step_seconds

    def _step_after(self, now: float) -> int:
        """The step that is computed at this moment."""
        if not self.jobs:
            return self._step + 1
        beyond = now - self._time_of(self._step + 1)
        return self._step + 1 if beyond <= 0 else self._step + 1 + math.ceil(beyond / self._step_seconds - 1e-9)

    def _wake_at(self, step: int) -> None:
        self._wake_step = step
        self.wake = self._time_of(step)
