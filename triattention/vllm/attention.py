"""Attention's view of a compacted request: null blocks squeezed out of the block table, seq_lens shortened.

Positions, RoPE, slot mapping and block-table appends stay as vLLM has them; only the metadata that the attention
kernel reads is changed, in the builder, so the kernels themselves are vLLM's own.
"""

from dataclasses import replace

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from triattention.vllm.kv_manager import CompactedAttentionSpec


def squeeze(block_table: torch.Tensor, seq_lens: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows without their null blocks, and the lengths that go with them; the inputs where no row has any.

    block_table int32 [requests, max_blocks], seq_lens int [requests] (tokens). A block is null only left of
    `ceil(seq_len / block_size)`: a row's unused tail is 0 as well. A row's null blocks are one run.

    >>> squeeze(torch.tensor([[5, 0, 0, 7, 8, 0]]), torch.tensor([18]), 4)
    (tensor([[5, 7, 8, 8, 0, 0]]), tensor([10]))
    """
    column = torch.arange(block_table.shape[1], device=block_table.device)
    used = (seq_lens + block_size - 1) // block_size
    null = (block_table == 0) & (column < used[:, None])
    count = null.sum(dim=1)
    if not count.any():
        return block_table, seq_lens
    first = null.to(torch.uint8).argmax(dim=1)
    index = column + (column >= first[:, None]) * count[:, None]
    index.clamp_(max=block_table.shape[1] - 1)
    return block_table.gather(1, index), seq_lens - (count * block_size).to(seq_lens.dtype)


class CompactedCPUMetadataBuilder(CPUAttentionMetadataBuilder):
    """`CPUAttentionMetadataBuilder` over squeezed rows, for the groups that are compacted."""

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> CPUAttentionMetadata:
        if isinstance(self.kv_cache_spec, CompactedAttentionSpec):
            block_table, seq_lens = squeeze(
                common_attn_metadata.block_table_tensor, common_attn_metadata.seq_lens, self.block_size
            )
            if seq_lens is not common_attn_metadata.seq_lens:
                common_attn_metadata = replace(common_attn_metadata, block_table_tensor=block_table, seq_lens=seq_lens)
        return super().build(common_prefix_len, common_attn_metadata, fast_build)


class CompactedCPUAttentionBackend(CPUAttentionBackend):
    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        return CompactedCPUMetadataBuilder
