"""The messages between replicas, router and coordinator: small frozen values, no behaviour."""

from dataclasses import dataclass

from replicas.messages import CapacityReport, ReplicaLimits

__all__ = ["CapacityReport", "Decision", "Demand", "Placement", "Refusal", "ReplicaLimits"]


@dataclass(frozen=True)
class Demand:
    """What a request asks for. Sizes in tokens; `total_tokens` is prompt plus output of one sequence."""

    reservation: str
    prompt_tokens: int
    total_tokens: int
    sequences: int = 1
    priority: int = 0


@dataclass(frozen=True)
class Placement:
    reservation: str
    replica: str
    reason: str
    """Why this replica: the label of the placements metric."""


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
