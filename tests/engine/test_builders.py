"""What attention reads, per backend: vLLM's own metadata builders with ours mixed in, on CPU tensors.

The FlashAttention builder is the one that a GPU would use, without its ahead-of-time schedule, which needs CUDA. (The
Triton builder, and with it both model runners' block tables, runs in a whole engine in `test_gpu_path`.)
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import FullAttentionSpec

from triattention import kernels
from triattention.config import CompressionConfig
from triattention.vllm.attention import SqueezingBuilder
from triattention.vllm.cpu import CompactedCPUMetadataBuilder, CPUCompactionWorker
from triattention.vllm.gpu import (
    CompactedFlashMetadataBuilder,
    CompactedTritonMetadataBuilder,
    GPUCompactionWorker,
)
from triattention.vllm.kv_manager import CompactedAttentionSpec

BLOCK, WIDTH, ROWS = 32, 128, 8
PLAIN = FullAttentionSpec(block_size=BLOCK, num_kv_heads=2, head_size=32, dtype=torch.float32)
Build = Callable[[type[SqueezingBuilder], FullAttentionSpec], SqueezingBuilder]


@pytest.fixture(scope="module")
def vllm_config(tiny_model: Path) -> VllmConfig:
    settings = {"dtype": "float32", "max_model_len": 4096, "max_num_seqs": ROWS, "block_size": BLOCK}
    return EngineArgs(str(tiny_model), enforce_eager=True, skip_tokenizer_init=True, **settings).create_engine_config()


@pytest.fixture
def build(vllm_config: VllmConfig) -> Build:
    def make(builder: type[SqueezingBuilder], spec: FullAttentionSpec) -> SqueezingBuilder:
        with set_current_vllm_config(vllm_config):
            return builder(spec, [], vllm_config, torch.device("cpu"), block_table_width=WIDTH)

    return make


@pytest.fixture
def compacted(vllm_config: VllmConfig) -> CompactedAttentionSpec:
    config = CompressionConfig(budget=64, window=16, policy="random")
    return CompactedAttentionSpec.from_full_attention(PLAIN, config, vllm_config)


def metadata(rows: list[tuple[list[int], int]], padded_rows: int | None = None) -> CommonAttentionMetadata:
    """One decode step over rows (block ids, tokens); padding rows are empty, as for CUDA graphs."""
    count = padded_rows or len(rows)
    table = torch.zeros((count, WIDTH), dtype=torch.int32)
    lengths = torch.zeros(count, dtype=torch.int32)
    for row, (ids, tokens) in enumerate(rows):
        table[row, : len(ids)], lengths[row] = torch.tensor(ids, dtype=torch.int32), tokens
    starts = torch.arange(count + 1, dtype=torch.int32)
    return CommonAttentionMetadata(
        query_start_loc=starts, query_start_loc_cpu=starts, seq_lens=lengths, num_reqs=count, num_actual_tokens=count,
        max_query_len=1, max_seq_len=int(lengths.max()), block_table_tensor=table,
        slot_mapping=torch.arange(count), causal=True,
    )  # fmt: skip


STEP = [([5, 0, 0, 7, 8], 150), ([9, 4], 40)]


@pytest.mark.parametrize(
    "builder", [CompactedFlashMetadataBuilder, CompactedTritonMetadataBuilder, CompactedCPUMetadataBuilder]
)
def test_attention_reads_squeezed_rows_and_everything_else_as_before(
    build: Build, compacted: CompactedAttentionSpec, builder: type[SqueezingBuilder]
) -> None:
    ours = build(builder, compacted)
    ours.compacted_requests = {"first"}
    common = metadata(STEP)
    seen = ours.build(0, common)
    assert seen.block_table[0, :3].tolist() == [5, 7, 8]
    assert seen.block_table[1, :2].tolist() == [9, 4]
    assert seen.seq_lens.tolist() == [150 - 2 * BLOCK, 40]
    assert seen.slot_mapping is common.slot_mapping
    assert common.block_table_tensor[0, :5].tolist() == [5, 0, 0, 7, 8]
    assert common.seq_lens.tolist() == [150, 40]


@pytest.mark.parametrize("builder", [CompactedFlashMetadataBuilder, CompactedTritonMetadataBuilder])
def test_what_a_captured_graph_reads_never_moves_and_is_refilled_by_every_step(
    build: Build, compacted: CompactedAttentionSpec, builder: type[SqueezingBuilder]
) -> None:
    ours = build(builder, compacted)
    captured = ours.build_for_cudagraph_capture(metadata([], padded_rows=4))
    table, lengths = captured.block_table, captured.seq_lens
    for step, live in ((STEP, [86, 40, 0, 0]), ([([3], 7)], [7, 0, 0, 0])):
        seen = ours.build(0, metadata(step, padded_rows=4))
        assert seen.block_table.data_ptr() == table.data_ptr()
        assert seen.seq_lens.data_ptr() == lengths.data_ptr()
        assert lengths.tolist() == live
    assert table[0, 0] == 3


@pytest.mark.parametrize("builder", [CompactedFlashMetadataBuilder, CompactedTritonMetadataBuilder])
def test_groups_that_are_not_compacted_are_left_to_vllm(build: Build, builder: type[SqueezingBuilder]) -> None:
    common = metadata([([5, 0, 0, 7, 8], 150)])
    ours = build(builder, PLAIN)
    assert ours.build(0, common).block_table is common.block_table_tensor
    assert ours.supports_update_block_table is builder.__mro__[2].supports_update_block_table


def test_no_unsqueezed_table_is_put_into_anothers_metadata(build: Build, compacted: CompactedAttentionSpec) -> None:
    """The V1 runner reuses metadata between groups of equal spec where a builder says that it may."""
    assert not build(CompactedFlashMetadataBuilder, compacted).supports_update_block_table


def test_a_cpu_step_without_a_compacted_request_does_no_work(
    build: Build, compacted: CompactedAttentionSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = build(CompactedCPUMetadataBuilder, compacted)

    def forbidden(*_: object) -> None:
        raise AssertionError("squeezed for nothing")

    monkeypatch.setattr(kernels, "squeeze", forbidden)
    common = metadata([([9, 4], 40)])
    assert ours.build(0, common).block_table is common.block_table_tensor


BACKENDS = GPUCompactionWorker.backends | CPUCompactionWorker.backends


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
def test_our_backends_differ_from_vllms_in_their_builder_only(backend: AttentionBackendEnum) -> None:
    ours = BACKENDS[backend]
    assert ours.get_name() == backend.name
    assert set(vars(ours)) - {"__module__", "__doc__", "__abstractmethods__", "_abc_impl"} == {"get_builder_cls"}
    assert issubclass(ours.get_builder_cls(), SqueezingBuilder)
