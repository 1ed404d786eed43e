"""The messages between replicas, router and coordinator: small frozen values, no behaviour."""

from dataclasses import dataclass

from triattention.config import CompressionConfig
from triattention.report import EngineReport


@dataclass(frozen=True)
class ReplicaLimits:
    """What never changes while a replica lives; sent with every report so that a restarted coordinator knows it."""

    max_model_len: int
    compression: CompressionConfig | None


@dataclass(frozen=True)
class CapacityReport:
    """One replica's view of itself. `epoch` is new for every engine start; `sequence` grows by one a report."""

    replica: str
    epoch: str
    sequence: int
    limits: ReplicaLimits
    engine: EngineReport
    held_blocks: dict[str, int]
    """Reservation id -> blocks held now, for the requests that this report knows."""
    finished: tuple[str, ...] = ()
    """Reservation ids that ended since the last report."""


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
