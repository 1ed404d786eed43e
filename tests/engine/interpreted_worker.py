"""The GPU worker of `tests.engine.interpreted_engine`: ours over vLLM's CPU worker, for want of CUDA."""

from vllm.v1.worker.cpu_worker import CPUWorker

from triattention.vllm.gpu import GPUCompactionWorker


class InterpretedGPUWorker(GPUCompactionWorker, CPUWorker):
    pass
