"""Every metric of ours, by name, and how a fleet snapshot is exposed. Dashboards and tests import the names.

`triattention_` is what the engines say of themselves, `trifleet_` what the coordinator knows and decides.
Labels are `model`, `replica`, `reason`, `class` and `tier`; never a request or a key, so the number of series is
bounded by the number of replicas and of tiers. An engine that starts anew starts its counters anew, as Prometheus
expects of one.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Literal

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from deploy.ledger import ReplicaSnapshot
from deploy.snapshot import WAIT_BUCKETS_SECONDS, FleetSnapshot, TierSnapshot
from replicas.messages import FIRST_TOKEN_BUCKETS_SECONDS
from triattention.report import COMPACTION_BUCKETS_SECONDS

Kind = Literal["counter", "gauge", "histogram"]
REPLICA = ("model", "replica")
FLEET = ("model",)
TIER = ("model", "tier")


@dataclass(frozen=True)
class Descriptor:
    """A metric as Prometheus shows it: `name` is the whole name, with `_total` for counters."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...]


COMPACTIONS = Descriptor("triattention_compactions_total", "counter", "Compactions of a request's KV cache.", REPLICA)
FREED_BLOCKS = Descriptor(
    "triattention_freed_blocks_total", "counter", "KV blocks that compactions gave back to the pool.", REPLICA
)
RECLAIMED_BYTES = Descriptor(
    "triattention_reclaimed_bytes_total", "counter", "Bytes of the freed blocks, over all layers.", REPLICA
)
EVICTED_TOKENS = Descriptor(
    "triattention_evicted_tokens_total", "counter", "Tokens that compactions dropped, per KV head.", REPLICA
)
STRANDED_SLOTS = Descriptor(
    "triattention_stranded_slots",
    "gauge",
    "Live slots lost to alignment after the compactions so far; 0 by construction.",
    REPLICA,
)
PREEMPTIONS = Descriptor(
    "triattention_preemptions_total", "counter", "Requests that lost all their blocks to others.", REPLICA
)
PEAK_BLOCKS_PER_REQUEST = Descriptor(
    "triattention_peak_blocks_per_request", "gauge", "Most KV blocks that one request has held.", REPLICA
)
UNCOMPRESSED_BLOCKS = Descriptor(
    "triattention_uncompressed_blocks",
    "gauge",
    "KV blocks that the requests in the engine would hold without compaction.",
    REPLICA,
)
COMPACTION_SECONDS = Descriptor(
    "triattention_compaction_seconds", "histogram", "Time of one compaction: score, select and move.", REPLICA
)
STEP_SECONDS = Descriptor(
    "triattention_step_seconds_total", "counter", "Time in engine steps, compaction included.", REPLICA
)
GENERATED_TOKENS = Descriptor("triattention_generated_tokens_total", "counter", "Tokens generated.", REPLICA)
BLOCK_TOKENS = Descriptor("triattention_block_tokens", "gauge", "Tokens that one KV block holds.", REPLICA)
BLOCK_BYTES = Descriptor("triattention_block_bytes", "gauge", "Bytes of one KV block, over all layers.", REPLICA)

TOTAL_BLOCKS = Descriptor("trifleet_total_blocks", "gauge", "KV blocks of the replica's pool.", REPLICA)
FREE_BLOCKS = Descriptor("trifleet_free_blocks", "gauge", "Free KV blocks, as last reported.", REPLICA)
HELD_BLOCKS = Descriptor("trifleet_held_blocks", "gauge", "KV blocks in use, as last reported.", REPLICA)
RESERVED_BLOCKS = Descriptor(
    "trifleet_reserved_blocks", "gauge", "Blocks promised to requests that no report shows yet.", REPLICA
)
PREDICTED_BLOCKS = Descriptor(
    "trifleet_predicted_blocks",
    "gauge",
    "Blocks that running requests may still take, up to their bound.",
    REPLICA,
)
HEADROOM_BLOCKS = Descriptor(
    "trifleet_headroom_blocks", "gauge", "Free less reserved, predicted and watermark blocks.", REPLICA
)
DRIFT_BLOCKS = Descriptor(
    "trifleet_ledger_drift_blocks",
    "gauge",
    "Held blocks that no reservation explains; negative where requests share prefix blocks.",
    REPLICA,
)
REPORT_AGE = Descriptor("trifleet_report_age_seconds", "gauge", "Age of the replica's last report.", REPLICA)
FRESH = Descriptor(
    "trifleet_replica_fresh", "gauge", "1 while the replica reports; 0 takes it out of placement.", REPLICA
)
DRAINING = Descriptor(
    "trifleet_replica_draining",
    "gauge",
    "1 while the replica was told to stop and finishes what it has.",
    REPLICA,
)
RUNNING = Descriptor("trifleet_running_requests", "gauge", "Sequences that decode, as last reported.", REPLICA)
WAITING = Descriptor(
    "trifleet_waiting_requests", "gauge", "Sequences that wait inside the engine, as last reported.", REPLICA
)
RESERVATIONS = Descriptor("trifleet_reservations", "gauge", "Requests booked on the replica.", REPLICA)
PLACEMENTS = Descriptor(
    "trifleet_placements_total", "counter", "Requests placed on the replica, by reason.", (*REPLICA, "reason")
)

ADMISSIONS = Descriptor("trifleet_admissions_total", "counter", "Requests placed on any replica.", TIER)
REJECTIONS = Descriptor("trifleet_rejections_total", "counter", "Requests refused, by reason.", (*TIER, "reason"))
QUEUE_LENGTH = Descriptor(
    "trifleet_queue_length", "gauge", "Requests that wait for a replica, by class.", (*TIER, "class")
)
QUEUED_BLOCKS = Descriptor("trifleet_queued_blocks", "gauge", "Blocks that the waiting requests need.", FLEET)
QUEUE_WAIT = Descriptor(
    "trifleet_queue_wait_seconds", "histogram", "Time from submission to placement.", (*TIER, "class")
)
LEASE_EXPIRATIONS = Descriptor(
    "trifleet_lease_expirations_total", "counter", "Reservations that ended unheard of.", FLEET
)
REPORTS_IGNORED = Descriptor(
    "trifleet_reports_ignored_total",
    "counter",
    "Reports that were duplicate, overtaken or of a past epoch.",
    FLEET,
)

RETRIES = Descriptor(
    "trifleet_retries_total",
    "counter",
    "Requests placed anew because their replica failed before the first byte of its answer.",
    FLEET,
)
PROBES = Descriptor("trifleet_probes_total", "counter", "Silent replicas that were asked for a report.", FLEET)
WANTED_REPLICAS = Descriptor(
    "trifleet_wanted_replicas", "gauge", "Replicas that autoscaling, or else the settings, ask for.", FLEET
)
COORDINATOR_START = Descriptor(
    "trifleet_coordinator_start_time_seconds",
    "gauge",
    "When the coordinator started, in seconds since 1970; it changes with every restart.",
    FLEET,
)
ENDED_REQUESTS = Descriptor(
    "trifleet_ended_requests_total", "counter", "Requests that ended on a replica, in whatever way.", TIER
)
PROMPT_TOKENS = Descriptor("trifleet_prompt_tokens_total", "counter", "Prompt tokens of ended requests.", TIER)
OUTPUT_TOKENS = Descriptor("trifleet_output_tokens_total", "counter", "Output tokens of ended requests.", TIER)
BLOCK_SECONDS = Descriptor(
    "trifleet_kv_block_seconds_total",
    "counter",
    "KV blocks times the seconds for which ended requests held them.",
    TIER,
)
FIRST_TOKEN = Descriptor(
    "trifleet_first_token_seconds", "histogram", "Time from a request's arrival to its first answered byte.", TIER
)
FIRST_TOKEN_TARGET = Descriptor(
    "trifleet_first_token_target_seconds", "gauge", "The tier's latency target; 0 where it has none.", TIER
)

METRICS: tuple[Descriptor, ...] = tuple(value for value in globals().values() if isinstance(value, Descriptor))

_PER_REPLICA: dict[Descriptor, Callable[[ReplicaSnapshot], float]] = {
    COMPACTIONS: lambda replica: replica.engine.compactions,
    FREED_BLOCKS: lambda replica: replica.engine.freed_blocks,
    RECLAIMED_BYTES: lambda replica: replica.engine.reclaimed_bytes,
    EVICTED_TOKENS: lambda replica: replica.engine.evicted_tokens,
    STRANDED_SLOTS: lambda replica: replica.engine.stranded_slots,
    PREEMPTIONS: lambda replica: replica.engine.preemptions,
    PEAK_BLOCKS_PER_REQUEST: lambda replica: replica.engine.peak_blocks_per_request,
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
    OUTPUT_TOKENS: lambda tier: tier.usage.output_tokens,
    BLOCK_SECONDS: lambda tier: tier.usage.block_seconds,
    FIRST_TOKEN_TARGET: lambda tier: tier.first_token_target_seconds or 0.0,
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
        waits = HistogramMetricFamily(QUEUE_WAIT.name, QUEUE_WAIT.help, labels=QUEUE_WAIT.labels)
        first = HistogramMetricFamily(FIRST_TOKEN.name, FIRST_TOKEN.help, labels=FIRST_TOKEN.labels)
        for name, tier in fleet.tiers.items():
            for kind, histogram in tier.counts.waits.items():
                waits.add_metric(
                    (self._model, name, kind), _buckets(WAIT_BUCKETS_SECONDS, histogram.counts), histogram.sum_seconds
                )
            usage = tier.usage
            buckets = _buckets(FIRST_TOKEN_BUCKETS_SECONDS, usage.first_token_counts)
            first.add_metric((self._model, name), buckets, usage.first_token_seconds)
        yield waits
        yield first


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
