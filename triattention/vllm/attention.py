"""Attention's view of a compacted request: null blocks squeezed out of the block table, seq_lens shortened.

Positions, RoPE, slot mapping and block-table appends stay as vLLM has them; only the metadata that the attention
kernel reads is changed, in the builder, so the kernels themselves are vLLM's own.
"""

from collections.abc import Sized
from dataclasses import replace
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import AttentionBackend, AttentionMetadataBuilder, CommonAttentionMetadata
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.attention.selector import _cached_get_attn_backend
from vllm.v1.kv_cache_interface import AttentionSpec

from triattention import kernels
from triattention.vllm.kv_manager import CompactedAttentionSpec


def override_backend(backend: AttentionBackendEnum, ours: type[AttentionBackend]) -> None:
    """Put ours in the place of vLLM's own, also where an engine in this process has chosen one before."""
    register_backend(backend, f"{ours.__module__}.{ours.__name__}")
    _cached_get_attn_backend.cache_clear()


class SqueezingBuilder(AttentionMetadataBuilder[Any]):
    """Mixed in before a backend's own metadata builder: it then reads squeezed rows, for the groups that are compacted.

    The rows stand in buffers that never move, for captured CUDA graphs read them there; `fixed_addresses` is off where
    there are no such graphs, and a step in which no request is compacted then costs nothing.
    """

    requires_block_table_width = True
    fixed_addresses = True

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
        block_table_width: int,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.compacted_requests: Sized = ()
        """Requests whose rows hold null blocks; the worker shares its table here."""
        self.squeezes = isinstance(kv_cache_spec, CompactedAttentionSpec)
        if self.squeezes:
            # Or the runner would put an unsqueezed table into another group's metadata.
            self.supports_update_block_table = False
            rows = max(
                vllm_config.scheduler_config.max_num_seqs,
                vllm_config.compilation_config.max_cudagraph_capture_size or 0,
            )
            self.block_table = torch.zeros((rows, block_table_width), dtype=torch.int32, device=device)
            self.live_lengths = torch.zeros(rows, dtype=torch.int32, device=device)

    def warm_up(self) -> None:
        """Compile what squeezes rows, on the empty ones of its buffers."""
        if self.squeezes:
            table, lengths = self.block_table, self.live_lengths
            kernels.squeeze(table, lengths, self.kv_cache_spec.block_size, table, lengths)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Any:
        if self.squeezes and (self.fixed_addresses or len(self.compacted_requests)):
            common_attn_metadata = self.squeezed(common_attn_metadata)
        return super().build(common_prefix_len, common_attn_metadata, fast_build)

    def squeezed(self, metadata: CommonAttentionMetadata) -> CommonAttentionMetadata:
        lengths = metadata.seq_lens
        rows = len(lengths)
        block_table = metadata.block_table_tensor[:rows]
        squeezed, live_lengths = self.block_table[:rows, : block_table.shape[1]], self.live_lengths[:rows]
        kernels.squeeze(block_table, lengths, self.kv_cache_spec.block_size, squeezed, live_lengths)
        return replace(metadata, block_table_tensor=squeezed, seq_lens=live_lengths)
