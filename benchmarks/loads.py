"""What engines are compared on: loads, and the settings of an engine for one. To be imported before vLLM and torch,
which read their environment once.
"""

import os

from benchmarks.environment import engine_environment

# One thread an engine, as a replica of the fleet runs on a CPU.
os.environ.update(engine_environment(), OMP_NUM_THREADS="1")

from dataclasses import dataclass
from typing import Any

import bundled
from benchmarks.models import Model
from triattention.config import CompressionConfig
from triattention.vllm import engine_arguments, on_this_machine

BLOCK_SIZE = 32
SIDES = ("plain", "ours")
PROMPT_ROOM = 192
"""No prompt of a load has so many tokens."""


@dataclass(frozen=True)
class Load:
    """One round of one side: `requests` at once, each to `output_tokens`."""

    requests: int
    output_tokens: int
    pool_tokens: int
    budget: int

    @property
    def max_model_len(self) -> int:
        return max(4096, self.output_tokens + PROMPT_ROOM)

    @property
    def fits_whole(self) -> bool:
        """The KV memory, less the null block, holds one longest request whole: plain vLLM does not start otherwise."""
        return self.pool_tokens - BLOCK_SIZE >= self.max_model_len

    @property
    def whole_tokens(self) -> int:
        """KV memory in which nothing needs to be preempted or evicted."""
        return self.requests * (self.output_tokens + PROMPT_ROOM)

    def prompts(self, round_number: int) -> list[str]:
        """Of under 100 tokens, different in every round, the same for all sides."""
        first = round_number * self.requests
        return [bundled.demo_prompt(seed, self.output_tokens) for seed in range(first, first + self.requests)]


TIGHT = Load(requests=32, output_tokens=2000, pool_tokens=16_384, budget=256)
AMPLE = Load(requests=32, output_tokens=200, pool_tokens=32_768, budget=4096)
"""A budget that no request reaches: nothing is compacted, and what is left is what our parts cost."""


def engine_settings(model: Model, load: Load, side: str) -> dict[str, Any]:
    """Arguments of vLLM's engine; `side` "ours" is compressed, any other is plain vLLM."""
    arguments: dict[str, Any] = {
        "model": str(model.path),
        "max_model_len": load.max_model_len,
        "block_size": BLOCK_SIZE,
        "num_gpu_blocks_override": load.pool_tokens // BLOCK_SIZE,
        "max_num_seqs": load.requests,
        "max_num_batched_tokens": 2048,
        "enforce_eager": True,
    }
    if side == "ours":
        compression = {"budget": load.budget, "interval": 128, "window": 64, "statistics": model.statistics}
        arguments |= engine_arguments(CompressionConfig.model_validate(compression))
    return on_this_machine(arguments)
