"""How many KV blocks a request can hold at most: one formula for vLLM's admission and for the coordinator."""

from triattention.config import CompressionConfig


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def blocks_bound(
    prompt_tokens: int,
    total_tokens: int,
    block_size: int,
    config: CompressionConfig | None,
    in_flight_tokens: int,
) -> int:
    """Most blocks that a request of `total_tokens` (prompt and output) ever holds at once.

    Without compression that is its whole length. With it, the tokens behind the pinned prompt blocks never
    exceed budget + interval, rounded up to the block boundary at which a compaction may cut, plus the tokens
    of the steps in flight (`in_flight_tokens`): a compaction sees processed tokens only.

    >>> blocks_bound(100, 10_000, 32, CompressionConfig(budget=256, interval=128, policy="random"), 2)
    18
    """
    whole = cdiv(total_tokens, block_size)
    if config is None:
        return whole
    pinned = cdiv(prompt_tokens, block_size) if config.prompt == "pin" else 0
    live = config.budget + config.interval + block_size - 1 + in_flight_tokens
    return min(whole, pinned + cdiv(live, block_size))
