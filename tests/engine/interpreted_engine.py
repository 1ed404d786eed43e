"""A vLLM engine on the GPU's code path without a GPU: `python -m tests.engine.interpreted_engine JOB`.

Real: vLLM's scheduler, its V1 or V2 model runner, its Triton attention backend and Triton kernels; our GPU worker,
metadata builder, cache views and Triton kernels. All Triton kernels run under Triton's interpreter, on the CPU.

Faked, and nothing else: a Triton driver that says it is active, a compute capability of 9.0, the choice of attention
backend (vLLM's CPU platform knows one only), and CPUWorker under GPUCompactionWorker in place of vLLM's CUDA worker.

JOB is a JSON file with `model`, `block_size`, `prompts`, `tokens`, `compression`, `asynchronous` and `warm_up`; results
are written beside it. Nothing here may be imported by a test: the interpreter would be on for every kernel of its
process.
"""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.update(
    TRITON_INTERPRET="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_LOGGING_LEVEL="ERROR",
)

import torch
from triton.backends import backends


class FakeActiveDriver:
    @staticmethod
    def is_active() -> bool:
        return True


def generate(job: dict[str, Any]) -> dict[str, Any]:
    # vLLM decides on import whether there is Triton.
    backends["cpu"] = SimpleNamespace(driver=FakeActiveDriver)
    torch.cuda.get_device_capability = lambda *_: (9, 0)

    from vllm import LLM, SamplingParams
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.worker.gpu.warmup import run_mixed_prefill_decode_warmup

    from tests.engine.conftest import asynchronous_scheduling
    from tests.unit.interpreted import multiply_bf16_as_numbers
    from triattention import kernels
    from triattention.config import CompressionConfig
    from triattention.kernels import with_triton
    from triattention.vllm import engine_arguments
    from triattention.vllm.gpu import CompactedTritonMetadataBuilder

    multiply_bf16_as_numbers()
    kernels._path = lambda _device: with_triton
    backend = AttentionBackendEnum.TRITON_ATTN
    CpuPlatform.get_attn_backend_cls = classmethod(lambda *_, **__: backend.get_path())

    launched = set()

    def noting(name: str) -> Any:
        kernel = getattr(with_triton, name)

        def launch(*arguments: Any) -> Any:
            launched.add(name)
            return kernel(*arguments)

        return launch

    for name in ("score", "plan", "compact", "squeeze"):
        setattr(with_triton, name, noting(name))

    addresses = set()
    build = CompactedTritonMetadataBuilder.build

    def recording(self: Any, *arguments: Any, **keywords: Any) -> Any:
        metadata = build(self, *arguments, **keywords)
        addresses.add((metadata.block_table.data_ptr(), metadata.seq_lens.data_ptr()))
        return metadata

    CompactedTritonMetadataBuilder.build = recording

    arguments = engine_arguments(CompressionConfig.model_validate(job["compression"]))
    arguments["worker_cls"] = "tests.engine.interpreted_worker.InterpretedGPUWorker"
    arguments["additional_config"]["triattention_reports"] = False
    settings = {
        "dtype": "float32", "max_model_len": 512, "block_size": job["block_size"], "max_num_seqs": 4,
        "enforce_eager": True,
        "num_gpu_blocks_override": 40, "kv_cache_memory_bytes": 1 << 26, "skip_tokenizer_init": True,
        "max_num_batched_tokens": 64, "async_scheduling": job["asynchronous"],
    }  # fmt: skip
    if job["asynchronous"]:
        with asynchronous_scheduling():
            llm = LLM(job["model"], **settings, **arguments)
    else:
        llm = LLM(job["model"], **settings, **arguments)
    warmed_up = sorted(launched)
    core = llm.llm_engine.engine_core.engine_core
    scheduler, worker = core.scheduler, core.model_executor.driver_worker.worker
    if job["warm_up"]:
        # As vLLM's GPU worker does at its start, with step messages that no scheduler made.
        assert run_mixed_prefill_decode_warmup(worker.model_runner, worker.execute_model, worker.sample_tokens, 8)
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in job["prompts"]],
        SamplingParams(temperature=0, max_tokens=job["tokens"], ignore_eos=True, detokenize=False),
        use_tqdm=False,
    )
    return {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "compactions": scheduler.compacted[0].compactions,
        "timed": sum(scheduler.compaction_counts),
        "free_blocks": scheduler.kv_cache_manager.block_pool.get_num_free_blocks(),
        "total_blocks": scheduler.total_blocks,
        "runner": type(worker.model_runner).__mro__[1].__module__,
        "builder": type(worker.model_runner.attn_groups[0][0].metadata_builders[0]).__name__,
        "block_tables": type(worker.block_tables).__name__,
        "addresses": len(addresses),
        "warmed_up": warmed_up,
        "compacted_requests": sorted(worker.compacted_requests),
    }


def main(job: Path) -> None:
    job.with_suffix(".result").write_text(json.dumps(generate(json.loads(job.read_text()))))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
