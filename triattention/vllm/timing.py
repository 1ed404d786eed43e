"""How long compactions take, on the device that does them, and how that travels with a step's output."""

import time

import torch
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

from triattention.vllm.orders import attach_seconds


class Stopwatch:
    """Measures what happens between construction and `stop`: on a GPU its own time, without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.start = self._mark()

    def stop(self) -> None:
        self.end = self._mark()

    def _mark(self) -> "torch.cuda.Event | float":
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> float:
        """Call it when the step's output is there: the GPU has passed both marks then."""
        if isinstance(self.start, float) and isinstance(self.end, float):
            return self.end - self.start
        assert isinstance(self.start, torch.cuda.Event), "marks are of one kind"
        assert isinstance(self.end, torch.cuda.Event), "marks are of one kind"
        return self.start.elapsed_time(self.end) / 1000


class TimedOutput(AsyncModelRunnerOutput):
    """vLLM's output of a step, still on its way, that brings the times of the step's compactions along."""

    def __init__(self, output: AsyncModelRunnerOutput, compactions: list[tuple[Stopwatch, int]]) -> None:
        self.output = output
        self.compactions = compactions

    def get_output(self) -> ModelRunnerOutput:
        return with_times(self.output.get_output(), self.compactions)


def with_times(output: ModelRunnerOutput, compactions: list[tuple[Stopwatch, int]]) -> ModelRunnerOutput:
    """Attaches one figure per compaction: of those that were carried out together, its share."""
    seconds = [watch.seconds() / count for watch, count in compactions for _ in range(count)]
    attach_seconds(output, seconds)
    return output
