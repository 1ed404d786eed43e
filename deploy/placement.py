"""Which of the replicas that fit: plain functions with one signature, chosen by name in the settings.

A policy sees only replicas that are fresh and have the headroom; whether a request may run at all is
decided in `admission.py`. It sees them as columns, so that a thousand cost about as much as ten.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Candidates:
    """The replicas that fit one request now, at least one, as aligned columns [candidates]."""

    headroom_blocks: NDArray[np.int64]
    need_blocks: NDArray[np.int64]
    """The request's bound on each replica: block sizes and budgets may differ between replicas."""
    requests: NDArray[np.int64]
    """Running, waiting and reserved but not yet seen: what shares the replica's steps."""

    def __len__(self) -> int:
        return len(self.requests)


Policy = Callable[[Candidates, random.Random], int]
"""The index of the chosen candidate."""


def most_headroom(candidates: Candidates, rng: random.Random) -> int:
    """The replica on which the most requests of this kind would still fit.

    Headroom counts in units of the request's own need, because blocks of two replicas are not comparable
    when their block sizes or budgets differ. Equal ones go to the replica with fewer requests.
    """
    room = candidates.headroom_blocks / candidates.need_blocks
    roomiest = np.flatnonzero(room == room.max())
    return int(roomiest[candidates.requests[roomiest].argmin()])


def least_loaded_of_two(candidates: Candidates, rng: random.Random) -> int:
    """Two drawn at random, the one with fewer requests: short requests want steps, not memory.

    Two and not all, so that many requests between two reports do not run to the same replica
    (Mitzenmacher, "The power of two choices in randomized load balancing", 2001).
    """
    everyone = range(len(candidates))
    pair = everyone if len(candidates) <= 2 else rng.sample(everyone, 2)
    return min(
        pair,
        key=lambda i: (candidates.requests[i], -candidates.headroom_blocks[i] / candidates.need_blocks[i]),
    )


POLICIES: dict[str, Policy] = {
    "most_headroom": most_headroom,
    "least_loaded_of_two": least_loaded_of_two,
}
