"""How long the coordinator's decisions take, without Ray: `python -m benchmarks.fleet_simulation.decisions`.

Three kinds of replica, all filled, then a queue of 3,000; medians of what is timed, in microseconds.
"""

import random
import statistics
import time
from collections.abc import Callable, Iterable

from deploy.admission import Admission
from deploy.messages import CapacityReport, Demand, ReplicaLimits
from deploy.settings import CoordinatorSettings
from triattention.config import CompressionConfig
from triattention.report import EngineReport

SIZES = (10, 1_000)
KINDS = ((256, 32), (384, 32), (256, 64))
"""Blocks of the pool, tokens of a block."""
CONFIG = CompressionConfig.model_validate({"budget": 256, "interval": 128, "window": 32, "policy": "random"})


def report(number: int, sequence: int, held: dict[str, int]) -> CapacityReport:
    blocks, block_size = KINDS[number % len(KINDS)]
    free = blocks - sum(held.values())
    engine = EngineReport(block_size, 1, blocks, free, running=len(held), waiting=0, in_flight_tokens=2)
    return CapacityReport(f"r{number}", "first", sequence, ReplicaLimits(8192, CONFIG), engine, held)


def median_microseconds(call: Callable[[int], object], numbers: Iterable[int]) -> float:
    times = []
    for number in numbers:
        began = time.perf_counter()
        call(number)
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e6


def measure(replicas: int) -> dict[str, float]:
    core = Admission(
        CoordinatorSettings(
            queue_length=5000, queue_deadline_seconds=1e6, lease_seconds=1e6, stale_report_seconds=1e6,
            short_request_tokens=512,
        ),
        random.Random(0),
    )  # fmt: skip
    for number in range(replicas):
        core.observe(report(number, 1, {}), 0.0)
    acquire = median_microseconds(lambda i: core.submit(Demand(f"a{i}", 100, 3000), 0.0), range(5 * replicas))
    for prompt, total in ((100, 3000), (10, 20)):
        number = 0
        while core.submit(Demand(f"fill-{total}-{number}", prompt, total), 0.0) is not None:
            number += 1
    for number in range(1500):
        core.submit(Demand(f"long{number}", 100, 3000), 0.0)
        core.submit(Demand(f"short{number}", 50, 200), 0.0)
    tick = median_microseconds(lambda i: core.tick(0.0), range(50))
    held = [dict.fromkeys(known.bookings, 5) for known in core._ledger.replicas.values()]
    reports = [report(number % replicas, 2 + number, held[number % replicas]) for number in range(2000)]
    observe = median_microseconds(lambda i: core.observe(reports[i], 0.0), range(2000))
    return {
        "acquire": acquire,
        "report": observe,
        "tick": tick,
        "snapshot": median_microseconds(lambda i: core.snapshot(0.0), range(5)),
    }


if __name__ == "__main__":
    for size in SIZES:
        print(f"{size:6,} replicas:", ", ".join(f"{name} {us:,.0f} us" for name, us in measure(size).items()))
