"""What one engine says of its KV memory after a step: the message from its scheduler to whoever listens."""

from dataclasses import dataclass, field
from typing import Any

REPORT_KEY = "triattention"

COMPACTION_BUCKETS_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)
"""Upper bounds of the compaction-time histogram; one more bucket holds what took longer."""

FIRST_COMPACTION_BUCKETS_SECONDS = (0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0)
"""The same for the time from a request's arrival to its first compaction."""


@dataclass(frozen=True)
class EngineReport:
    """Counters run from the engine's start; blocks are KV blocks of `block_size` tokens, without the null block."""

    block_size: int
    bytes_per_block: int
    total_blocks: int
    free_blocks: int
    running: int
    waiting: int
    in_flight_tokens: int
    """Most tokens that can be scheduled but not yet processed for one request (for `blocks_bound`)."""
    preemptions: int = 0
    compactions: int = 0
    freed_blocks: int = 0
    evicted_tokens: int = 0
    stranded_slots: int = 0
    """Slots of live blocks beyond the tokens kept, as the block tables had them after the compactions so far: 0."""
    peak_blocks_per_request: int = 0
    pinned_blocks: int = 0
    """Held blocks that belong to pinned prompts; such as several requests share count once for each."""
    uncompressed_blocks: int = 0
    """Blocks that the requests which hold any would hold if nothing were ever compacted."""
    generated_tokens: int = 0
    step_seconds: float = 0.0
    """Time spent in engine steps that computed something, compaction included."""
    compaction_seconds: float = 0.0
    compaction_counts: tuple[int, ...] = (0,) * (len(COMPACTION_BUCKETS_SECONDS) + 1)
    """Compactions per bucket of COMPACTION_BUCKETS_SECONDS, each counted once."""
    first_compaction_seconds: float = 0.0
    first_compaction_counts: tuple[int, ...] = (0,) * (len(FIRST_COMPACTION_BUCKETS_SECONDS) + 1)
    """First compactions of requests per bucket of FIRST_COMPACTION_BUCKETS_SECONDS, each counted once."""
    held_blocks: dict[str, int] = field(default_factory=dict)
    """vLLM's internal request id -> blocks it holds."""
    output_tokens: dict[str, int] = field(default_factory=dict)
    """The same -> tokens written so far."""
    ended: dict[str, tuple[int, int]] = field(default_factory=dict)
    """vLLM's internal request id -> prompt and output tokens, of those that ended since the last report."""

    @property
    def reclaimed_bytes(self) -> int:
        return self.freed_blocks * self.bytes_per_block

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))  # not asdict, which copies deeply: this runs in the engine's step

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "EngineReport":
        """From a dict that may have been through msgpack or JSON, which know lists but not tuples."""
        counts = {name: tuple(values[name]) for name in ("compaction_counts", "first_compaction_counts")}
        return cls(**{**values, **counts})
