"""Pushes one engine's capacity reports to the coordinator: on change and at a heartbeat, one in flight.

Owns sequence numbers and the mapping from vLLM's request ids back to reservations. Knows nothing of Ray: the
way to the coordinator is a coroutine function. Never blocks the engine's event loop.
"""

import asyncio
import contextlib
import logging
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from replicas.headers import reservation_of
from replicas.messages import CapacityReport, GpuReading, ReplicaLimits
from replicas.meter import Meter
from triattention.report import EngineReport

logger = logging.getLogger("ray.serve")

SHORTEST_INTERVAL_SECONDS = 0.05
SEND_TIMEOUT_SECONDS = 5.0

Send = Callable[[CapacityReport], Awaitable[None]]


class Reporter:
    def __init__(
        self, replica: str, limits: ReplicaLimits, heartbeat_seconds: float, send: Send, node: str = ""
    ) -> None:
        self.replica = replica
        self._limits = limits
        self._node = node
        self._heartbeat_seconds = heartbeat_seconds
        self._send = send
        self._epoch = uuid.uuid4().hex
        self._sequence = 0
        self._engine: dict[str, Any] | None = None
        self._meter = Meter(time.monotonic)
        self._held: dict[str, int] = {}
        self.gpu: GpuReading | None = None
        """Goes with every report; whoever reads the GPUs sets it."""
        self._active: set[str] = set()
        self._written: dict[str, int] = {}
        """Reservation -> output tokens of its sequences that run."""
        self._ended: Counter[str] = Counter()
        """Reservation -> output tokens of its sequences that have ended."""
        self._finished: dict[str, float] = {}
        """Reservation -> its block-seconds, until a report told it."""
        self._changed = asyncio.Event()
        self._reachable = True

    def observe(self, engine: dict[str, Any]) -> None:
        """Called by the engine's statistics tap after every step: must be cheap."""
        if engine != self._engine:
            self._engine = engine
            self._held = by_reservation(engine["held_blocks"])
            self._count_output(engine["output_tokens"], engine["ended"])
            self._changed.set()
        self._meter.observe(self._held, engine["ended"])

    def _count_output(self, running: Mapping[str, int], ended: Mapping[str, Sequence[int]]) -> None:
        """By vLLM's request ids: output tokens so far; prompt and output tokens."""
        told_of = self._active | self._finished.keys()
        for request, (_, output) in ended.items():
            if (reservation := reservation_of(request)) in told_of:
                self._ended[reservation] += output
                self._written.pop(reservation, None)
        # What runs no more and is not told as ended yet keeps its last count.
        self._written |= {r: tokens for r, tokens in by_reservation(running).items() if r in told_of}

    def begin(self, reservation: str, tier: str, length_class: str, waited_seconds: float) -> None:
        """The request of this reservation is here: shown in every report, also while it holds no blocks yet."""
        self._meter.begin(reservation, tier, length_class, waited_seconds)
        self._active.add(reservation)
        self._changed.set()

    def answered(self, reservation: str) -> None:
        """The first byte of its answer is on its way."""
        self._meter.answered(reservation)

    def decoded(self, request: str, seconds_per_token: float) -> None:
        """Called by the engine's statistics tap when a sequence ends: its mean time per output token."""
        self._meter.decoded(request, seconds_per_token)

    def usage(self, reservation: str) -> tuple[str, float]:
        """Its tier, and the KV block-seconds that it has taken so far."""
        return self._meter.usage(reservation)

    def finish(self, reservation: str) -> None:
        """It has ended, in whatever way."""
        self._active.discard(reservation)
        self._finished[reservation] = self._meter.finish(reservation)
        self._changed.set()

    async def run(self) -> None:
        """Report until cancelled."""
        while True:
            # Not wait_for: in Python 3.11 it forgets a cancellation that comes together with a change.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._heartbeat_seconds):
                    await self._changed.wait()
            self._changed.clear()
            await self._report()
            await asyncio.sleep(SHORTEST_INTERVAL_SECONDS)

    def report(self) -> CapacityReport | None:
        """The newest; None before the engine's first step."""
        if self._engine is None:
            return None
        finished = dict(self._finished)
        self._sequence += 1
        return CapacityReport(
            replica=self.replica,
            epoch=self._epoch,
            sequence=self._sequence,
            limits=self._limits,
            # What the engine says of single requests is told by reservation, once.
            engine=replace(EngineReport.from_dict(self._engine), held_blocks={}, output_tokens={}, ended={}),
            held_blocks={**dict.fromkeys(self._active, 0), **self._held},
            output_tokens={
                reservation: self._written.get(reservation, 0) + self._ended[reservation]
                for reservation in (*self._active, *finished)
                if reservation in self._written or reservation in self._ended
            },
            finished=tuple(finished),
            block_seconds=finished,
            tiers=self._meter.tiers(),
            node=self._node,
            gpu=self.gpu,
        )

    async def _report(self) -> None:
        report = self.report()
        if report is None:
            return
        try:
            async with asyncio.timeout(SEND_TIMEOUT_SECONDS):
                await self._send(report)
        except Exception as error:
            # Mostly the coordinator is away: requests still flow, and what ended is told again when it is back.
            if self._reachable:
                logger.warning("Capacity reports do not get through (%r); trying again.", error)
            self._reachable = False
            return
        self._reachable = True
        for reservation in report.finished:
            for told in (self._finished, self._written, self._ended):
                told.pop(reservation, None)


def by_reservation(of_sequences: Mapping[str, int]) -> dict[str, int]:
    """Sums per reservation, from numbers by vLLM's request ids: one for every sequence of a request."""
    sums: defaultdict[str, int] = defaultdict(int)
    for request, number in of_sequences.items():
        if reservation := reservation_of(request):
            sums[reservation] += number
    return dict(sums)
