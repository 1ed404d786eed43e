"""A fake fleet for the dashboards' tests: the real admission core and exposition, fed by made-up engines.

Serves `/metrics` on a free loopback port. Its time runs with the clock; every scrape catches up with it.
"""

import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from typing import Any

from deploy.admission import Admission
from deploy.exposition import render
from deploy.messages import Demand, GpuReading, Pace, Placement, TierUsage
from deploy.settings import CoordinatorSettings
from deploy.snapshot import FleetSnapshot
from deploy.tiers import Tier
from replicas.messages import FIRST_TOKEN_BUCKETS_SECONDS, PER_TOKEN_BUCKETS_SECONDS
from tests.unit.reports import BLOCK, compression, report
from triattention.report import COMPACTION_BUCKETS_SECONDS, FIRST_COMPACTION_BUCKETS_SECONDS

MODEL = "fake-model"
TICK_SECONDS = 0.1
POOL_BLOCKS = 48
BUDGET = 256
MOST_LIVE_BLOCKS = (BUDGET + 128) // BLOCK
FREED_AT_ONCE = 128 // BLOCK
TIERS = {"default": Tier(), "gold": Tier(share=4, priority=-1, first_token_target_seconds=2)}


@dataclass
class FakeEngine:
    """Every request grows by a block a tick, is compacted when it reaches the most, and ends with its last token."""

    name: str
    sequence: int = 0
    held: dict[str, int] = field(default_factory=dict)
    ticks_left: dict[str, int] = field(default_factory=dict)
    uncompressed: dict[str, int] = field(default_factory=dict)
    counters: dict[str, Any] = field(
        default_factory=lambda: {
            "compactions": 0,
            "freed_blocks": 0,
            "evicted_tokens": 0,
            "peak_blocks_per_request": 0,
            "preemptions": 0,
            "generated_tokens": 0,
            "step_seconds": 0.0,
            "compaction_seconds": 0.0,
            "compaction_counts": (0,) * (len(COMPACTION_BUCKETS_SECONDS) + 1),
            "first_compaction_seconds": 0.0,
            "first_compaction_counts": (0,) * (len(FIRST_COMPACTION_BUCKETS_SECONDS) + 1),
            "pinned_blocks": 0,
            "uncompressed_blocks": 0,
        }
    )

    tiers: dict[str, TierUsage] = field(default_factory=dict)
    tier_of: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Reservation -> tier and class."""

    def start(self, reservation: str, length_class: str, tier: str, ticks: int) -> None:
        self.held[reservation] = self.uncompressed[reservation] = 1
        self.ticks_left[reservation] = ticks
        self.tier_of[reservation] = tier, length_class

    def meter(self, reservation: str) -> None:
        tier, length_class = self.tier_of.pop(reservation)
        used = self.tiers.get(tier, TierUsage())
        pace = used.pace.get(length_class, Pace())
        first, second, *rest = pace.first_token_counts
        fast, slow, *slower = pace.per_token_counts
        pace = Pace(
            output_tokens=pace.output_tokens + BLOCK * self.uncompressed[reservation],
            first_token_seconds=pace.first_token_seconds + FIRST_TOKEN_BUCKETS_SECONDS[1],
            first_token_counts=(first, second + 1, *rest),
            per_token_seconds=pace.per_token_seconds + PER_TOKEN_BUCKETS_SECONDS[1],
            per_token_counts=(fast, slow + 1, *slower),
        )
        self.tiers[tier] = TierUsage(
            requests=used.requests + 1,
            prompt_tokens=used.prompt_tokens + 20,
            block_seconds=used.block_seconds + TICK_SECONDS * self.held[reservation],
            pace={**used.pace, length_class: pace},
        )

    def tick(self) -> tuple[str, ...]:
        """Names of the requests that ended."""
        self.counters["step_seconds"] += TICK_SECONDS
        for reservation in self.held:
            self.ticks_left[reservation] -= 1
            self.held[reservation] += 1
            self.uncompressed[reservation] += 1
            self.counters["generated_tokens"] += BLOCK
            if self.held[reservation] > MOST_LIVE_BLOCKS:
                if self.uncompressed[reservation] == self.held[reservation]:
                    self.counters["first_compaction_seconds"] += 1.2
                    first, second, third, *rest = self.counters["first_compaction_counts"]
                    self.counters["first_compaction_counts"] = (first, second, third + 1, *rest)
                self.held[reservation] -= FREED_AT_ONCE
                self.counters["compactions"] += 1
                self.counters["compaction_seconds"] += 0.0007
                first, second, *rest = self.counters["compaction_counts"]
                self.counters["compaction_counts"] = (first, second + 1, *rest)
                self.counters["freed_blocks"] += FREED_AT_ONCE
                self.counters["evicted_tokens"] += FREED_AT_ONCE * BLOCK
        self.counters["peak_blocks_per_request"] = max(self.counters["peak_blocks_per_request"], *self.held.values(), 0)
        ended = tuple(reservation for reservation, left in self.ticks_left.items() if left <= 0)
        for reservation in ended:
            self.meter(reservation)
            del self.held[reservation], self.ticks_left[reservation], self.uncompressed[reservation]
        self.counters["pinned_blocks"] = len(self.held)
        self.counters["uncompressed_blocks"] = sum(self.uncompressed.values())
        self.sequence += 1
        return ended


class FakeFleet:
    """Two engines that get more than they can serve: a new request every tick, some of them impossible."""

    def __init__(self) -> None:
        self._rng = random.Random(0)
        self._admission = Admission(CoordinatorSettings(watermark_blocks=2), self._rng, TIERS)
        self._engines = {name: FakeEngine(name) for name in ("fake-a", "fake-b")}
        self._names = map(str, count())
        self._ticks_needed: dict[str, tuple[str, int]] = {}
        """Reservation -> its tier and how long it runs."""
        self._began = time.monotonic()
        self._ticks = 0
        self._lock = threading.Lock()

    def snapshot(self) -> FleetSnapshot:
        with self._lock:
            now = time.monotonic() - self._began
            while self._ticks * TICK_SECONDS <= now:
                self._tick(self._ticks * TICK_SECONDS)
                self._ticks += 1
            return self._admission.snapshot(now)

    def metrics(self) -> bytes:
        return render(self.snapshot(), MODEL)

    def _tick(self, now: float) -> None:
        decisions = self._admission.tick(now)
        for engine in self._engines.values():
            ended = engine.tick()
            made = report(
                engine.name,
                engine.sequence,
                total=POOL_BLOCKS,
                held=engine.held,
                running=len(engine.held),
                finished=ended,
                max_model_len=4096,
                compression=compression(BUDGET),
                gpu=GpuReading(1, 80 << 30, 70 << 30, 350.0, 350.0 * now),
                **engine.counters,
            )
            decisions += self._admission.observe(replace(made, tiers=dict(engine.tiers)), now)
        tier = self._rng.choice(list(TIERS))
        demand = Demand(next(self._names), 20, self._rng.choice((96, 320, 1600, 3200, 9600)), tier=tier, tenant=tier)
        self._ticks_needed[demand.reservation] = (tier, demand.total_tokens // BLOCK - 1)
        for decision in [*decisions, self._admission.submit(demand, now)]:
            if isinstance(decision, Placement):
                engine = self._engines[decision.replica]
                engine.start(decision.reservation, decision.length_class, *self._ticks_needed[decision.reservation])


@contextmanager
def fake_fleet_server() -> Iterator[str]:
    """The address of `/metrics`."""
    fleet = FakeFleet()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = fleet.metrics()
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/metrics"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
