"""How many KV blocks a request needs on a replica, and the refusal of one that can never fit. No state."""

from collections.abc import Sequence

from deploy.messages import Demand, Refusal
from deploy.replica_table import ReplicaKind
from triattention.bounds import blocks_bound

NEVER = 2**62
"""The need of a request that a replica's limits do not allow: more blocks than any pool has."""


def blocks_needed(demand: Demand, kind: ReplicaKind) -> int:
    """Most blocks that the request ever holds at once on such a replica, over all its sequences."""
    bound = blocks_bound(
        demand.prompt_tokens,
        demand.total_tokens,
        kind.block_size,
        kind.limits.compression,
        kind.in_flight_tokens,
    )
    return max(1, bound) * demand.sequences


def blocks_wanted(demand: Demand, kind: ReplicaKind) -> int:
    """`blocks_needed`, or NEVER where `max_model_len` does not allow it."""
    return NEVER if demand.total_tokens > kind.limits.max_model_len else blocks_needed(demand, kind)


def refuse_if_never(demand: Demand, replicas: Sequence[tuple[ReplicaKind, int]]) -> Refusal | None:
    """A 400 that names the limit when no known replica could ever take the request, else None.

    `replicas` are the known kinds, each with the blocks that its largest pool can give to one request. Without any,
    nothing is known of the limits, so nothing is refused.
    """
    if not replicas or any(blocks_wanted(demand, kind) <= usable for kind, usable in replicas):
        return None
    longest = max(kind.limits.max_model_len for kind, _ in replicas)
    if demand.total_tokens > longest:
        output = demand.total_tokens - demand.prompt_tokens
        return Refusal(
            demand.reservation,
            status=400,
            reason="over_max_model_len",
            message=(
                f"The request asks for {demand.prompt_tokens} prompt and {output} output tokens, "
                f"{demand.total_tokens} together, but max_model_len is {longest}: "
                "shorten the prompt or lower max_tokens."
            ),
        )
    # Refused by the pool: of the replicas whose length limit allows it, name the one that comes closest.
    need, usable = min(
        (
            (blocks_needed(demand, kind), usable)
            for kind, usable in replicas
            if demand.total_tokens <= kind.limits.max_model_len
        ),
        key=lambda pair: pair[0] - pair[1],
    )
    return Refusal(
        demand.reservation,
        status=400,
        reason="over_kv_pool",
        message=(
            f"The request can hold {need} KV blocks, but a replica's KV pool has {usable} to give: "
            "lower max_tokens or n, or shorten the prompt."
        ),
    )
