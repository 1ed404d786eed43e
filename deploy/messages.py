"""The messages between replicas, router and coordinator: small frozen values, no behaviour."""

from dataclasses import dataclass

from replicas.access import ANONYMOUS, DEFAULT_TIER
from replicas.messages import CapacityReport, GpuReading, Pace, ReplicaLimits, TierUsage

__all__ = [
    "CapacityReport",
    "Decision",
    "DecisionPair",
    "Demand",
    "GpuReading",
    "Pace",
    "Placement",
    "Refusal",
    "ReplicaLimits",
    "TierUsage",
]


@dataclass(frozen=True)
class Demand:
    """What a request asks for. Sizes in tokens; `total_tokens` is prompt plus output of one sequence."""

    reservation: str
    prompt_tokens: int
    total_tokens: int
    sequences: int = 1
    priority: int = 0
    tier: str = DEFAULT_TIER
    tenant: str = ANONYMOUS
    """Whose share of the queue it is charged to."""
    former: str | None = None
    """The reservation under which it was placed before and came back: it keeps that one's place in the queue, and its
    tenant's minute has been charged."""
    waited_seconds: float = 0.0
    """In the router and in the queue: they count towards its deadline, also where HAProxy sends it again."""
    avoid: str | None = None
    """A replica that has just failed this request: it does not go there again."""
    prefix: tuple[int, ...] = ()
    """Hashes of the prompt's beginning, the shortest first (`affinity.prefix_hashes`)."""
    node: str = ""
    """The node on which it came in; empty where unknown."""


@dataclass(frozen=True)
class FleetLoad:
    """The replicas that take requests, for autoscaling. Blocks."""

    replicas: int
    capacity_blocks: int
    """All pools together, less the watermarks."""
    committed_blocks: int
    """Held, reserved, and predicted growth."""
    queued_blocks: int
    """What the waiting requests need."""


@dataclass(frozen=True)
class Placement:
    reservation: str
    replica: str
    reason: str
    """Why this replica: the label of the placements metric."""
    length_class: str
    """"short" or "long": a label of metrics."""


@dataclass(frozen=True)
class Refusal:
    reservation: str
    status: int
    """HTTP status: 400 can never fit, 429 queue full, 503 no replica or deadline passed."""
    reason: str
    """Short label of the rejections metric."""
    message: str
    """One sentence for the client: the limit by name, its value, the remedy."""
    retry_after_seconds: int | None = None


Decision = Placement | Refusal
DecisionPair = tuple[Placement | None, Refusal | None]
"""The same on the wire, where one of the two is null: msgpack does not tell one message from another."""
