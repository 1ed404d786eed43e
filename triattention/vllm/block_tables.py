"""The worker's own copies of block tables, in which a compaction's dead blocks become null as in the scheduler's."""

from typing import Protocol

from vllm.v1.worker.gpu.model_runner import GPUModelRunner as V2ModelRunner
from vllm.v1.worker.gpu_model_runner import GPUModelRunner as V1ModelRunner

from triattention.vllm.orders import CompactionOrder


class BlockTableMirror(Protocol):
    def null(self, order: CompactionOrder) -> None:
        """Null the order's dead blocks. The request must be one that the runner knows and the step does not drop."""


class V1BlockTables:
    """Rows in host memory, copied to the device at each step; requests out of the batch have theirs as lists."""

    def __init__(self, runner: V1ModelRunner) -> None:
        self.runner = runner

    def null(self, order: CompactionOrder) -> None:
        if self.runner.prepare_inputs_event is not None:
            # Async scheduling: the last step's copy to the device may not have read the row yet.
            self.runner.prepare_inputs_event.synchronize()
        dead = slice(order.first_dead_block, order.first_live_block)
        self.runner.requests[order.request_id].block_ids[order.group][dead] = [0] * (dead.stop - dead.start)
        row = self.runner.input_batch.req_id_to_index.get(order.request_id)
        if row is not None:
            self.runner.input_batch.block_table[order.group].block_table.np[row, dead] = 0


class V2BlockTables:
    """Rows on the device, written through staged writes, which `execute_model` applies before it reads any."""

    def __init__(self, runner: V2ModelRunner) -> None:
        self.runner = runner

    def null(self, order: CompactionOrder) -> None:
        row = self.runner.req_states.req_id_to_index[order.request_id]
        dead = order.first_live_block - order.first_dead_block
        self.runner.block_tables.block_tables[order.group].stage_write(row, order.first_dead_block, [0] * dead)


def mirror_of(runner: V1ModelRunner | V2ModelRunner) -> BlockTableMirror:
    """Raises ValueError for a model runner whose block tables are not known."""
    if isinstance(runner, V1ModelRunner):
        return V1BlockTables(runner)
    if isinstance(runner, V2ModelRunner):
        return V2BlockTables(runner)
    raise ValueError(
        f"KV compression does not know the model runner {type(runner).__name__}: use vLLM's own, or remove the "
        "triattention settings."
    )
