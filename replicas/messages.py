"""What a replica tells the coordinator: small frozen values, no behaviour."""

from dataclasses import dataclass, field

from triattention.config import CompressionConfig
from triattention.report import EngineReport


@dataclass(frozen=True)
class ReplicaLimits:
    """What never changes while a replica lives; in every report, so that a restarted coordinator knows it."""

    max_model_len: int
    compression: CompressionConfig | None


FIRST_TOKEN_BUCKETS_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
"""Upper bounds of the first-token histogram; one more bucket holds what took longer."""
PER_TOKEN_BUCKETS_SECONDS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0)
"""The same for a request's mean time per output token after the first."""


@dataclass(frozen=True)
class Pace:
    """How fast the requests of one tier and class were served since the engine's start. Only ever grows."""

    output_tokens: int = 0
    first_token_seconds: float = 0.0
    """Sum over the requests of which a byte was answered, from their arrival at the router."""
    first_token_counts: tuple[int, ...] = (0,) * (len(FIRST_TOKEN_BUCKETS_SECONDS) + 1)
    """Requests per bucket of FIRST_TOKEN_BUCKETS_SECONDS, each counted once."""
    per_token_seconds: float = 0.0
    """Sum of the sequences' means, as vLLM measures them."""
    per_token_counts: tuple[int, ...] = (0,) * (len(PER_TOKEN_BUCKETS_SECONDS) + 1)
    """Sequences per bucket of PER_TOKEN_BUCKETS_SECONDS, each counted once."""


@dataclass(frozen=True)
class TierUsage:
    """What the requests of one tier took since the engine's start. Only ever grows, so that no lost report matters."""

    requests: int = 0
    """Ended, in whatever way."""
    prompt_tokens: int = 0
    block_seconds: float = 0.0
    """KV blocks held, times the seconds for which they were."""
    pace: dict[str, Pace] = field(default_factory=dict)
    """By class of length, "short" and "long"."""

    @property
    def output_tokens(self) -> int:
        return sum(pace.output_tokens for pace in self.pace.values())


@dataclass(frozen=True)
class GpuReading:
    """The GPUs of one replica, all together."""

    gpus: int
    memory_bytes: int
    memory_used_bytes: int
    power_watts: float | None
    energy_joules: float | None
    """Since the replica's start. None where the GPU does not tell."""


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
    output_tokens: dict[str, int] = field(default_factory=dict)
    """Reservation id -> tokens written so far by all of its sequences, for those of `held_blocks` and of `finished`
    of which the engine has told it."""
    block_seconds: dict[str, float] = field(default_factory=dict)
    """Reservation id -> what it took, for those of `finished` that were metered."""
    tiers: dict[str, TierUsage] = field(default_factory=dict)
    node: str = ""
    """Where the replica runs; empty where unknown."""
    gpu: GpuReading | None = None
    """As last read; None where there is no NVML."""
