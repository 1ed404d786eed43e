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
    need_blocks: NDArray[np.float64]
    """What it is expected to take on each replica: block sizes and budgets may differ between replicas."""
    requests: NDArray[np.int64]
    """Running, waiting and reserved but not yet seen: what shares the replica's steps."""
    affinity: NDArray[np.int64]
    """How much of the prompt the replica has probably cached; 0: nothing. Decides between equal replicas only."""
    is_local: NDArray[np.bool_]
    """On the node on which the request came in."""

    def __len__(self) -> int:
        return len(self.requests)


Policy = Callable[[Candidates, random.Random], int]
"""The index of the chosen candidate."""


# Replicas whose room is within so much of the roomiest are equal: there a cached prefix is worth more.
EQUAL_ROOM = 0.9


def most_headroom(candidates: Candidates, rng: random.Random) -> int:
    """The replica on which the most requests of this kind would still fit.

    Headroom counts in units of the request's own need, because blocks of two replicas are not comparable
    when their block sizes or budgets differ. Among those with about as much room, the one that has cached most of
    the prompt; without any, the roomiest, and among equal ones that of the same node, then that with fewer requests.
    """
    room = candidates.headroom_blocks / candidates.need_blocks
    affinity = np.where(room >= EQUAL_ROOM * room.max(), candidates.affinity, 0)
    if affinity.max() > 0:
        return _first(np.flatnonzero(affinity == affinity.max()), candidates, -room)
    return _first(np.flatnonzero(room == room.max()), candidates, -room)


def least_loaded_of_two(candidates: Candidates, rng: random.Random) -> int:
    """Two drawn at random, the one with fewer requests: short requests want steps, not memory.

    Two and not all, so that many requests between two reports do not run to the same replica
    (Mitzenmacher, "The power of two choices in randomized load balancing", 2001). The least loaded of those that have
    cached most of the prompt is compared with them, and wins where it has no more requests.
    """
    everyone = range(len(candidates))
    drawn = list(everyone) if len(candidates) <= 2 else rng.sample(everyone, 2)
    if (most := candidates.affinity.max()) > 0:
        cached = np.flatnonzero(candidates.affinity == most)
        drawn.append(int(cached[candidates.requests[cached].argmin()]))
    fewest = candidates.requests[drawn].min()
    equal = np.array([i for i in drawn if candidates.requests[i] == fewest])
    equal = equal[candidates.affinity[equal] == candidates.affinity[equal].max()]
    return _first(equal, candidates, -candidates.headroom_blocks / candidates.need_blocks)


def _first(equal: NDArray[np.intp], candidates: Candidates, order: NDArray[np.float64]) -> int:
    """Of equal candidates (their indices) one of the same node, then the first in `order`, then the least loaded."""
    return int(equal[np.lexsort((candidates.requests[equal], order[equal], ~candidates.is_local[equal]))[0]])


POLICIES: dict[str, Policy] = {
    "most_headroom": most_headroom,
    "least_loaded_of_two": least_loaded_of_two,
}
