"""Compaction on vLLM's CUDA worker, V1 and V2 model runners: FlashAttention's and Triton attention's builders.

Full CUDA graphs stay on: what a captured graph reads of a request, its squeezed row and its live length, stands at
addresses of its own, which every step refills (`SqueezingBuilder`); compactions run between steps.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend, FlashAttentionMetadataBuilder
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend, TritonAttentionMetadataBuilder
from vllm.v1.worker.gpu_worker import Worker
from vllm.v1.worker.worker_base import CompilationTimes

from triattention.kernels import PagedCache
from triattention.vllm.attention import SqueezingBuilder
from triattention.vllm.layout import gpu_caches
from triattention.vllm.worker_core import CompactingWorker


class CompactedFlashMetadataBuilder(SqueezingBuilder, FlashAttentionMetadataBuilder):
    pass


class CompactedFlashAttentionBackend(FlashAttentionBackend):
    @staticmethod
    def get_builder_cls() -> type[FlashAttentionMetadataBuilder]:
        return CompactedFlashMetadataBuilder


class CompactedTritonMetadataBuilder(SqueezingBuilder, TritonAttentionMetadataBuilder):
    pass


class CompactedTritonAttentionBackend(TritonAttentionBackend):
    @staticmethod
    def get_builder_cls() -> type[TritonAttentionMetadataBuilder]:
        return CompactedTritonMetadataBuilder


class GPUCompactionWorker(CompactingWorker, Worker):
    backends: ClassVar = {
        AttentionBackendEnum.FLASH_ATTN: CompactedFlashAttentionBackend,
        AttentionBackendEnum.TRITON_ATTN: CompactedTritonAttentionBackend,
    }

    @torch.inference_mode()
    def _warm_up(self) -> None:
        for group, compactor in self.compactors.items():
            compactor.warm_up()
            for attention in self.model_runner.attn_groups[group]:
                for builder in attention.metadata_builders:
                    builder.warm_up()

    def compile_or_warm_up_model(self) -> CompilationTimes:
        """Our kernels first: vLLM then watches for what is compiled while it serves (`vllm.utils.jit_monitor`)."""
        self._warm_up()
        return super().compile_or_warm_up_model()

    def caches_of(self, layers: Sequence[Attention]) -> tuple[PagedCache, PagedCache]:
        return gpu_caches(layers)
