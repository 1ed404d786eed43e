"""The fleet at one moment, and the counts of what was decided: what metrics, `trifleet status` and tests look at."""

import bisect
from dataclasses import dataclass, field

from deploy.ledger import ReplicaSnapshot
from deploy.messages import TierUsage
from deploy.queue import LONG, SHORT

REJECTION_REASONS = (
    "over_max_model_len",
    "over_kv_pool",
    "queue_full",
    "queue_deadline",
    "no_replica",
    "concurrent_requests",
    "requests_per_minute",
    # The router's own, of requests that never reach the queue.
    "no_key",
    "bad_request",
    "unknown_model",
    "body_too_large",
    "router_busy",
)
WAIT_BUCKETS_SECONDS = (0.001, 0.01, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


@dataclass
class WaitHistogram:
    """How long the requests of one class waited for their place, in Prometheus' buckets."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(WAIT_BUCKETS_SECONDS) + 1))
    """Per bucket, not cumulative; the last one is for longer waits than any bucket's."""
    sum_seconds: float = 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect.bisect_left(WAIT_BUCKETS_SECONDS, seconds)] += 1
        self.sum_seconds += seconds

    def copy(self) -> "WaitHistogram":
        return WaitHistogram(list(self.counts), self.sum_seconds)


@dataclass
class TierCounts:
    """What was decided for the requests of one tier, from the start."""

    admissions: int = 0
    rejections: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REJECTION_REASONS, 0))
    """By reason; every reason of REJECTION_REASONS is there."""
    waits: dict[str, WaitHistogram] = field(default_factory=lambda: {SHORT: WaitHistogram(), LONG: WaitHistogram()})
    """Time from submission to placement by class; 0 seconds for those who did not wait. A request that is placed anew
    is submitted anew, and counts again."""

    def copy(self) -> "TierCounts":
        waits = {kind: histogram.copy() for kind, histogram in self.waits.items()}
        return TierCounts(self.admissions, dict(self.rejections), waits)


@dataclass(frozen=True)
class TierSnapshot:
    """One tier at one moment."""

    first_token_target_seconds: float | None
    queue_length: dict[str, int]
    """Waiting requests by class, "short" and "long"."""
    counts: TierCounts
    usage: TierUsage


@dataclass(frozen=True)
class FleetSnapshot:
    """The fleet at one moment, for metrics, `trifleet status` and tests. Counts run from the start."""

    replicas: tuple[ReplicaSnapshot, ...]
    tiers: dict[str, TierSnapshot]
    queue_length: dict[str, int]
    """Waiting requests by class, over all tiers."""
    queued_blocks: int
    """What the waiting requests need together."""
    admissions: int
    placements: dict[str, dict[str, int]]
    """Replica -> reason -> placements."""
    rejections: dict[str, int]
    """Reason -> refusals, over all tiers; every reason of REJECTION_REASONS is there."""
    lease_expirations: int
    reports_ignored: int
    released_blocks_per_second: float
    """The pace at which reservations end; Retry-After is computed from it."""
    retries: int = 0
    """Requests placed anew because their replica failed before the first byte of its answer."""
    probes: int = 0
    """Silent replicas asked for a report."""
    wanted_replicas: int = 0
    """What autoscaling last asked for; without it, what the settings say."""
    started_at: float = 0.0
    """When this coordinator started, in seconds since 1970."""
