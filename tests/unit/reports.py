"""Capacity reports with sensible defaults, for the tests of the coordinator's core."""

from typing import Any

from deploy.ledger import Ledger
from deploy.messages import Demand
from replicas.messages import CapacityReport, GpuReading, ReplicaLimits
from triattention.config import CompressionConfig
from triattention.report import EngineReport

BLOCK = 32


def report(
    replica: str = "a",
    sequence: int = 1,
    *,
    epoch: str = "first",
    total: int = 100,
    held: dict[str, int] | None = None,
    free: int | None = None,
    running: int = 0,
    output_tokens: dict[str, int] | None = None,
    finished: tuple[str, ...] = (),
    max_model_len: int = 8192,
    compression: CompressionConfig | None = None,
    block_size: int = BLOCK,
    gpu: GpuReading | None = None,
    **counters: Any,
) -> CapacityReport:
    held = held or {}
    return CapacityReport(
        replica=replica,
        epoch=epoch,
        sequence=sequence,
        limits=ReplicaLimits(max_model_len, compression),
        engine=EngineReport(
            block_size=block_size,
            bytes_per_block=1024,
            total_blocks=total,
            free_blocks=total - sum(held.values()) if free is None else free,
            running=running,
            waiting=0,
            in_flight_tokens=2,
            **counters,
        ),
        held_blocks=held,
        output_tokens=output_tokens or {},
        finished=finished,
        gpu=gpu,
    )


def compression(budget: int = 256, interval: int = 128) -> CompressionConfig:
    return CompressionConfig(budget=budget, interval=interval, window=32, policy="random")


def demand(reservation: str, prompt: int = 100, output: int = 8000) -> Demand:
    return Demand(reservation, prompt, prompt + output)


def book(ledger: Ledger, demand: Demand, replica: str, bound: int, now: float) -> None:
    """As placing does it, with one bound for all kinds of replicas."""
    table = ledger.table
    uses = ledger.expected_use(demand, [bound] * len(table.kinds))
    ledger.book(demand, replica, bound, uses.row(table.kind[table.row_of[replica]]), now)
