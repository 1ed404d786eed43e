"""The messages between scheduler and workers: compactions to carry out before a step writes anything, and how long
they took. Both travel as attributes of vLLM's own step messages, which are pickled whole.
"""

from dataclasses import dataclass

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput

_ORDERS = "compaction_orders"
_SECONDS = "compaction_seconds"


@dataclass(frozen=True)
class CompactionOrder:
    """One compaction of one request in one KV-cache group; complete in itself, no worker state is needed.

    A request with 2 pinned blocks, its live region cut from block 2 to block 3 at 22 tokens (block size 4):
    first_dead_block=2, first_live_block=3, processed_tokens=22, block_ids=(ids of blocks 2, 3, 4, 5).
    """

    request_id: str
    group: int
    processed_tokens: int
    first_dead_block: int
    first_live_block: int
    block_ids: tuple[int, ...]
    """Physical ids from first_dead_block up to the block of the last processed token."""
    protected_blocks: tuple[int, ...] = ()
    """Offsets into block_ids of live blocks that other requests share: kept whole, never written."""


def attach_orders(output: SchedulerOutput, orders: list[CompactionOrder]) -> None:
    setattr(output, _ORDERS, orders)


def orders_of(output: SchedulerOutput) -> list[CompactionOrder]:
    """Empty for outputs that no scheduler made: vLLM warms the V2 runner up with some of its own."""
    orders: list[CompactionOrder] = vars(output).get(_ORDERS, [])
    return orders


def attach_seconds(output: ModelRunnerOutput, seconds: list[float]) -> None:
    """How long each compaction since the last output took on this worker."""
    setattr(output, _SECONDS, seconds)


def seconds_of(output: ModelRunnerOutput) -> list[float]:
    """Empty for outputs of steps without any, and of workers that do not time them."""
    seconds: list[float] = vars(output).get(_SECONDS, [])
    return seconds
