"""What travels between scheduler and workers beside vLLM's own step messages, and what does not."""

from vllm.v1.core.sched.output import SchedulerOutput

from triattention.vllm.orders import attach_orders, orders_of


def test_a_step_message_that_no_scheduler_made_brings_no_orders() -> None:
    """vLLM's GPU worker warms the V2 runner up with such; `test_gpu_path` does it in a whole engine."""
    output = SchedulerOutput.make_empty()
    assert orders_of(output) == []
    attach_orders(output, [])
    assert orders_of(output) == []
