"""What travels between scheduler and workers beside vLLM's own step messages, and what does not."""

from types import SimpleNamespace

import torch
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput

from triattention.vllm.orders import attach_orders, orders_of, seconds_of
from triattention.vllm.timing import Stopwatch
from triattention.vllm.worker_core import CompactingWorker


def test_a_step_message_that_no_scheduler_made_brings_no_orders() -> None:
    """vLLM's GPU worker warms the V2 runner up with such; `test_gpu_path` does it in a whole engine."""
    output = SchedulerOutput.make_empty()
    assert orders_of(output) == []
    attach_orders(output, [])
    assert orders_of(output) == []


def test_times_of_compactions_wait_for_a_step_with_an_output_of_its_own() -> None:
    """Where nothing is computed vLLM returns one object, always the same: what it held would be counted every time."""
    watch = Stopwatch(torch.device("cpu"))
    watch.stop()
    worker = SimpleNamespace(timed=[(watch, 2)])
    assert CompactingWorker._timed(worker, EMPTY_MODEL_RUNNER_OUTPUT) is EMPTY_MODEL_RUNNER_OUTPUT  # type: ignore[arg-type]
    assert seconds_of(EMPTY_MODEL_RUNNER_OUTPUT) == []
    output = CompactingWorker._timed(worker, ModelRunnerOutput(req_ids=[], req_id_to_index={}))  # type: ignore[arg-type]
    assert len(seconds_of(output)) == 2
    assert worker.timed == []
