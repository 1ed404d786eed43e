"""Compaction on vLLM's CPU worker: its attention backend's builder, its cache layouts."""

from collections.abc import Sequence
from typing import ClassVar

from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionMetadataBuilder
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.worker.cpu_worker import CPUWorker

from triattention.kernels import PagedCache
from triattention.vllm.attention import SqueezingBuilder
from triattention.vllm.layout import cpu_caches
from triattention.vllm.worker_core import CompactingWorker


class CompactedCPUMetadataBuilder(SqueezingBuilder, CPUAttentionMetadataBuilder):
    fixed_addresses = False  # no CUDA graphs


class CompactedCPUAttentionBackend(CPUAttentionBackend):
    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        return CompactedCPUMetadataBuilder


class CPUCompactionWorker(CompactingWorker, CPUWorker):
    backends: ClassVar = {AttentionBackendEnum.CPU_ATTN: CompactedCPUAttentionBackend}

    def caches_of(self, layers: Sequence[Attention]) -> tuple[PagedCache, PagedCache]:
        return cpu_caches(layers)
