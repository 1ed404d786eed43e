"""The compaction plan: when one is due and which blocks die. Pure; knows nothing of vLLM.

Which survivors move where is `triattention.kernels.plan`'s, from scores.

Blocks of a request, block size 4, two pinned prompt blocks, budget 8, at L = 22 processed tokens:

    block       0     1     2     3     4     5
    slots    [0..3][4..7][8..11][12..15][16..19][20..23]
              pinned        live region, 14 tokens

`first_live_block` cuts at block (22 - 8) // 4 = 3, so block 2 dies and the 10 slots 12..21 stay. Of the 14 scored
tokens the best 10 are kept; each one that stands in block 2 is copied into a hole, an evicted slot of 12..21. Slots
keep their order by position only before the first compaction; attention does not care, RoPE is in the keys.
"""

from triattention.config import CompressionConfig


def due_at(first_block: int, block_size: int, config: CompressionConfig) -> int:
    """Processed tokens at which a request whose live region starts at `first_block` is compacted next.

    `budget + interval` live tokens, or more where no whole block could die yet.
    """
    return first_block * block_size + config.budget + max(config.interval, block_size)


def first_live_block(processed_tokens: int, first_block: int, block_size: int, config: CompressionConfig) -> int | None:
    """Block at which the live region starts after a compaction at `processed_tokens`, or None where none is due.

    `first_block` is where it starts now. The kept count `processed_tokens - cut * block_size` is at least the
    budget and less than budget + block_size, so no slot is stranded.
    """
    if processed_tokens < due_at(first_block, block_size, config):
        return None
    return (processed_tokens - config.budget) // block_size
