"""What a replica tells the coordinator: small frozen values, no behaviour."""

from dataclasses import dataclass

from triattention.config import CompressionConfig
from triattention.report import EngineReport


@dataclass(frozen=True)
class ReplicaLimits:
    """What never changes while a replica lives; in every report, so that a restarted coordinator knows it."""

    max_model_len: int
    compression: CompressionConfig | None


@dataclass(frozen=True)
class CapacityReport:
    """A replica's view of itself. `epoch` is new for every engine start; `sequence` grows by one a report."""

    replica: str
    epoch: str
    sequence: int
    limits: ReplicaLimits
    engine: EngineReport
    held_blocks: dict[str, int]
    """Reservation id -> blocks held now, for the requests that this report knows."""
    finished: tuple[str, ...] = ()
    """Reservation ids that ended since the last report."""
