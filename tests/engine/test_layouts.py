"""Token-wise access to vLLM's CPU key and value layouts, checked against vLLM's own store kernel."""

import pytest
import torch
from vllm import _custom_ops as ops

from triattention.vllm.attention import squeeze
from triattention.vllm.layout import CPU_LAYOUTS, PagedTokens, split_cpu_cache


@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("layout", CPU_LAYOUTS, ids=lambda layout: layout.name)
def test_gather_reads_what_vllm_stored_and_copy_moves_whole_tokens(layout, head_dim: int) -> None:  # type: ignore[no-untyped-def]
    heads, block, blocks = 2, 64, 4
    dtype = torch.bfloat16 if layout.name == "amx" else torch.float32
    cache = torch.full((blocks, heads, block, 2 * head_dim), float("nan"), dtype=dtype)
    key_part, value_part = split_cpu_cache(cache)
    keys, values = (torch.randn(2 * block, heads, head_dim).to(dtype) for _ in range(2))
    block_ids = torch.tensor([3, 1])
    slots = (block_ids[:, None] * block + torch.arange(block)).flatten()
    ops.cpu_attn_reshape_and_cache(keys, values, key_part, value_part, slots, layout.name, 1.0, 1.0, "auto")

    stored_keys, stored_values = PagedTokens(layout.keys(key_part)), PagedTokens(layout.values(value_part))
    assert torch.equal(stored_keys.gather(block_ids), keys.transpose(0, 1))
    assert torch.equal(stored_values.gather(block_ids), values.transpose(0, 1))

    head, source, target = torch.tensor([0, 1, 1]), torch.tensor([5, 0, 63]), torch.tensor([70, 64, 127])
    for stored, expected in ((stored_keys, keys), (stored_values, values)):
        stored.copy(block_ids, head, source, target)
        wanted = expected.transpose(0, 1).clone()
        wanted[head, target] = wanted[head, source]
        assert torch.equal(stored.gather(block_ids), wanted)


def test_squeeze_drops_only_null_blocks_inside_the_used_part_of_a_row() -> None:
    table = torch.tensor([[5, 0, 0, 7, 8, 0], [1, 2, 3, 0, 0, 0], [0, 0, 4, 0, 0, 0]], dtype=torch.int32)
    squeezed, lengths = squeeze(table, torch.tensor([18, 11, 9], dtype=torch.int32), 4)
    assert squeezed[0, :3].tolist() == [5, 7, 8]
    assert squeezed[1, :3].tolist() == [1, 2, 3]
    assert squeezed[2, :1].tolist() == [4]
    assert lengths.tolist() == [10, 11, 1]
    assert squeezed.dtype == table.dtype
    assert lengths.dtype == torch.int32


def test_squeeze_returns_its_inputs_where_nothing_was_compacted() -> None:
    table, lengths = torch.tensor([[5, 6, 0]]), torch.tensor([7])
    assert all(a is b for a, b in zip(squeeze(table, lengths, 4), (table, lengths), strict=True))
