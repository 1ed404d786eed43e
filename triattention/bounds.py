"""How many KV blocks a request can hold at most: one formula for vLLM's admission and for the coordinator."""

from triattention.config import CompressionConfig


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def most_live_tokens(block_size: int, config: CompressionConfig) -> int:
    """Most processed tokens behind its pinned blocks that a request keeps: with one more it is compacted."""
    return config.budget + max(config.interval, block_size) - 1


def blocks_bound(
    prompt_tokens: int,
    total_tokens: int,
    block_size: int,
    config: CompressionConfig | None,
    in_flight_tokens: int,
) -> int:
    """Most blocks that a request of `total_tokens` (prompt and output) ever holds at once.

    Without compression that is its whole length. With it, a request is compacted once the processed tokens behind
    its pinned prompt blocks reach budget + interval (and a whole block can die), so one fewer is the most it keeps;
    on top come the tokens scheduled beyond the processed ones, this step's included (`in_flight_tokens`).

    >>> blocks_bound(100, 10_000, 32, CompressionConfig(budget=256, interval=128, policy="random"), 2)
    17
    """
    whole = cdiv(total_tokens, block_size)
    if config is None:
        return whole
    pinned = cdiv(config.pinned_tokens(prompt_tokens), block_size)
    live = most_live_tokens(block_size, config) + in_flight_tokens
    return min(whole, pinned + cdiv(live, block_size))
