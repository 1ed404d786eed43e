"""How a fleet snapshot is shown: in Prometheus' text format, and whole as JSON. The names are in `metrics.py`."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import accumulate

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from deploy.ledger import ReplicaSnapshot
from deploy.messages import GpuReading, Pace
from deploy.metrics import (
    ADMISSIONS,
    BLOCK_BYTES,
    BLOCK_SECONDS,
    BLOCK_TOKENS,
    COMPACTION_SECONDS,
    COMPACTIONS,
    COORDINATOR_START,
    DRAINING,
    DRIFT_BLOCKS,
    ENDED_REQUESTS,
    EVICTED_TOKENS,
    FIRST_COMPACTION_SECONDS,
    FIRST_TOKEN,
    FIRST_TOKEN_TARGET,
    FREE_BLOCKS,
    FREED_BLOCKS,
    FRESH,
    GENERATED_TOKENS,
    GPU_ENERGY_JOULES,
    GPU_MEMORY_BYTES,
    GPU_MEMORY_USED_BYTES,
    GPU_POWER_WATTS,
    GPUS,
    HEADROOM_BLOCKS,
    HELD_BLOCKS,
    LEASE_EXPIRATIONS,
    OUTPUT_TOKENS,
    PEAK_BLOCKS_PER_REQUEST,
    PER_TOKEN,
    PINNED_BLOCKS,
    PLACEMENTS,
    PREDICTED_BLOCKS,
    PREEMPTIONS,
    PROBES,
    PROMPT_TOKENS,
    QUEUE_LENGTH,
    QUEUE_WAIT,
    QUEUED_BLOCKS,
    RECLAIMED_BYTES,
    REJECTIONS,
    REPORT_AGE,
    REPORTS_IGNORED,
    RESERVATIONS,
    RESERVED_BLOCKS,
    RETRIES,
    RUNNING,
    STEP_SECONDS,
    STRANDED_SLOTS,
    TOTAL_BLOCKS,
    UNCOMPRESSED_BLOCKS,
    WAITING,
    WANTED_REPLICAS,
    Descriptor,
)
from deploy.queue import LONG, SHORT
from deploy.snapshot import WAIT_BUCKETS_SECONDS, FleetSnapshot, TierSnapshot
from replicas.messages import FIRST_TOKEN_BUCKETS_SECONDS, PER_TOKEN_BUCKETS_SECONDS
from triattention.report import COMPACTION_BUCKETS_SECONDS, FIRST_COMPACTION_BUCKETS_SECONDS

_PER_REPLICA: dict[Descriptor, Callable[[ReplicaSnapshot], float]] = {
    COMPACTIONS: lambda replica: replica.engine.compactions,
    FREED_BLOCKS: lambda replica: replica.engine.freed_blocks,
    RECLAIMED_BYTES: lambda replica: replica.engine.reclaimed_bytes,
    EVICTED_TOKENS: lambda replica: replica.engine.evicted_tokens,
    STRANDED_SLOTS: lambda replica: replica.engine.stranded_slots,
    PREEMPTIONS: lambda replica: replica.engine.preemptions,
    PEAK_BLOCKS_PER_REQUEST: lambda replica: replica.engine.peak_blocks_per_request,
    PINNED_BLOCKS: lambda replica: replica.engine.pinned_blocks,
    UNCOMPRESSED_BLOCKS: lambda replica: replica.engine.uncompressed_blocks,
    STEP_SECONDS: lambda replica: replica.engine.step_seconds,
    GENERATED_TOKENS: lambda replica: replica.engine.generated_tokens,
    BLOCK_TOKENS: lambda replica: replica.engine.block_size,
    BLOCK_BYTES: lambda replica: replica.engine.bytes_per_block,
    TOTAL_BLOCKS: lambda replica: replica.engine.total_blocks,
    FREE_BLOCKS: lambda replica: replica.engine.free_blocks,
    HELD_BLOCKS: lambda replica: replica.held_blocks,
    RESERVED_BLOCKS: lambda replica: replica.reserved_blocks,
    PREDICTED_BLOCKS: lambda replica: replica.predicted_blocks,
    HEADROOM_BLOCKS: lambda replica: replica.headroom_blocks,
    DRIFT_BLOCKS: lambda replica: replica.drift_blocks,
    REPORT_AGE: lambda replica: replica.report_age_seconds,
    FRESH: lambda replica: replica.fresh,
    DRAINING: lambda replica: replica.draining,
    RUNNING: lambda replica: replica.engine.running,
    WAITING: lambda replica: replica.engine.waiting,
    RESERVATIONS: lambda replica: replica.reservations,
}

_PER_FLEET: dict[Descriptor, Callable[[FleetSnapshot], float]] = {
    QUEUED_BLOCKS: lambda fleet: fleet.queued_blocks,
    LEASE_EXPIRATIONS: lambda fleet: fleet.lease_expirations,
    REPORTS_IGNORED: lambda fleet: fleet.reports_ignored,
    RETRIES: lambda fleet: fleet.retries,
    PROBES: lambda fleet: fleet.probes,
    WANTED_REPLICAS: lambda fleet: fleet.wanted_replicas,
    COORDINATOR_START: lambda fleet: fleet.started_at,
}

_PER_TIER: dict[Descriptor, Callable[[TierSnapshot], float]] = {
    ADMISSIONS: lambda tier: tier.counts.admissions,
    ENDED_REQUESTS: lambda tier: tier.usage.requests,
    PROMPT_TOKENS: lambda tier: tier.usage.prompt_tokens,
    BLOCK_SECONDS: lambda tier: tier.usage.block_seconds,
    FIRST_TOKEN_TARGET: lambda tier: tier.first_token_target_seconds or 0.0,
}


_PER_GPU: dict[Descriptor, Callable[[GpuReading], float | None]] = {
    GPUS: lambda gpu: gpu.gpus,
    GPU_MEMORY_BYTES: lambda gpu: gpu.memory_bytes,
    GPU_MEMORY_USED_BYTES: lambda gpu: gpu.memory_used_bytes,
    GPU_POWER_WATTS: lambda gpu: gpu.power_watts,
    GPU_ENERGY_JOULES: lambda gpu: gpu.energy_joules,
}


class FleetCollector(Collector):
    """Renders the snapshot of the moment at every scrape; keeps nothing between scrapes."""

    def __init__(self, model: str, read: Callable[[], FleetSnapshot]) -> None:
        self._model = model
        self._read = read

    def collect(self) -> Iterator[Metric]:
        fleet = self._read()
        for metric, of_replica in _PER_REPLICA.items():
            yield _family(metric, (((self._model, r.replica), of_replica(r)) for r in fleet.replicas))
        for metric, of_gpu in _PER_GPU.items():
            readings = ((r.replica, of_gpu(r.gpu)) for r in fleet.replicas if r.gpu is not None)
            known = (((self._model, replica), value) for replica, value in readings if value is not None)
            yield _family(metric, known)
        for metric, of_fleet in _PER_FLEET.items():
            yield _family(metric, [((self._model,), of_fleet(fleet))])
        for metric, of_tier in _PER_TIER.items():
            yield _family(metric, (((self._model, name), of_tier(tier)) for name, tier in fleet.tiers.items()))
        placements = (
            ((self._model, replica, reason), count)
            for replica, reasons in fleet.placements.items()
            for reason, count in reasons.items()
        )
        yield _family(PLACEMENTS, placements)
        rejections = (
            ((self._model, name, reason), count)
            for name, tier in fleet.tiers.items()
            for reason, count in tier.counts.rejections.items()
        )
        yield _family(REJECTIONS, rejections)
        lengths = (
            ((self._model, name, kind), count)
            for name, tier in fleet.tiers.items()
            for kind, count in tier.queue_length.items()
        )
        yield _family(QUEUE_LENGTH, lengths)
        compactions = HistogramMetricFamily(
            COMPACTION_SECONDS.name, COMPACTION_SECONDS.help, labels=COMPACTION_SECONDS.labels
        )
        for r in fleet.replicas:
            buckets = _buckets(COMPACTION_BUCKETS_SECONDS, r.engine.compaction_counts)
            compactions.add_metric((self._model, r.replica), buckets, r.engine.compaction_seconds)
        yield compactions
        firsts = HistogramMetricFamily(
            FIRST_COMPACTION_SECONDS.name, FIRST_COMPACTION_SECONDS.help, labels=FIRST_COMPACTION_SECONDS.labels
        )
        for r in fleet.replicas:
            buckets = _buckets(FIRST_COMPACTION_BUCKETS_SECONDS, r.engine.first_compaction_counts)
            firsts.add_metric((self._model, r.replica), buckets, r.engine.first_compaction_seconds)
        yield firsts
        waits = HistogramMetricFamily(QUEUE_WAIT.name, QUEUE_WAIT.help, labels=QUEUE_WAIT.labels)
        first = HistogramMetricFamily(FIRST_TOKEN.name, FIRST_TOKEN.help, labels=FIRST_TOKEN.labels)
        per_token = HistogramMetricFamily(PER_TOKEN.name, PER_TOKEN.help, labels=PER_TOKEN.labels)
        tokens = []
        for name, tier in fleet.tiers.items():
            for kind, histogram in tier.counts.waits.items():
                waits.add_metric(
                    (self._model, name, kind), _buckets(WAIT_BUCKETS_SECONDS, histogram.counts), histogram.sum_seconds
                )
            for kind in (SHORT, LONG):
                pace = tier.usage.pace.get(kind, Pace())
                tokens.append(((self._model, name, kind), pace.output_tokens))
                buckets = _buckets(FIRST_TOKEN_BUCKETS_SECONDS, pace.first_token_counts)
                first.add_metric((self._model, name, kind), buckets, pace.first_token_seconds)
                buckets = _buckets(PER_TOKEN_BUCKETS_SECONDS, pace.per_token_counts)
                per_token.add_metric((self._model, name, kind), buckets, pace.per_token_seconds)
        yield waits
        yield first
        yield per_token
        yield _family(OUTPUT_TOKENS, tokens)


def render(snapshot: FleetSnapshot, model: str) -> bytes:
    """One snapshot in Prometheus' text format, for a process that was sent it."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(FleetCollector(model, lambda: snapshot))
    return generate_latest(registry)


def as_json(snapshot: FleetSnapshot, model: str) -> bytes:
    """The same snapshot whole, for the fleet page and `trifleet status`."""
    values = {"model": model, **asdict(snapshot)}
    return json.dumps(values, default=lambda value: value.model_dump(mode="json")).encode()


def _family(metric: Descriptor, samples: Iterable[tuple[tuple[str, ...], float]]) -> Metric:
    kinds = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily}
    family = kinds[metric.kind](metric.name, metric.help, labels=metric.labels)
    for labels, value in samples:
        family.add_metric(labels, value)
    return family


def _buckets(bounds: Sequence[float], counts: Sequence[int]) -> list[tuple[str, float]]:
    """Counts per bucket, the last one without bound, as Prometheus has them: everything up to the bound."""
    names = [*map(str, bounds), "+Inf"]
    return [(name, float(total)) for name, total in zip(names, accumulate(counts), strict=True)]
