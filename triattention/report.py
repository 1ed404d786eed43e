"""What one engine says of its KV memory after a step: the message from its scheduler to whoever listens."""

from dataclasses import asdict, dataclass, field
from typing import Any

REPORT_KEY = "triattention"


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
    """Live slots lost to alignment after the compactions so far: 0 by construction, reported to prove it."""
    peak_blocks_per_request: int = 0
    held_blocks: dict[str, int] = field(default_factory=dict)
    """vLLM's internal request id -> blocks it holds."""

    @property
    def reclaimed_bytes(self) -> int:
        return self.freed_blocks * self.bytes_per_block

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "EngineReport":
        return cls(**values)
