"""`triattention.vllm.worker.CompactionWorker`: the worker for the platform that vLLM found on this machine."""

from vllm.platforms import current_platform

from triattention.vllm.worker_core import CompactingWorker


def worker_for_platform() -> type[CompactingWorker]:
    """Raises ValueError on a platform without a worker of ours. Workers are imported one at a time: vLLM's CPU worker
    replaces parts of torch.cuda when it is imported.
    """
    if current_platform.is_cpu():
        from triattention.vllm.cpu import CPUCompactionWorker

        return CPUCompactionWorker
    if current_platform.is_cuda():
        from triattention.vllm.gpu import GPUCompactionWorker

        return GPUCompactionWorker
    raise ValueError(
        f"KV compression runs on vLLM's CPU and CUDA platforms, but vLLM found {current_platform.device_name}: remove "
        "the triattention settings there."
    )


CompactionWorker = worker_for_platform()
