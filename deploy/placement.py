"""Which of the replicas that fit: plain functions with one signature, chosen by name in the settings.

A policy sees only replicas that are fresh and have the headroom; whether a request may run at all is
decided in `admission.py`.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Candidate:
    """One replica that fits one request now."""

    replica: str
    headroom_blocks: int
    need_blocks: int
    """The request's bound on this replica: block sizes and budgets may differ between replicas."""
    requests: int
    """Running, waiting and reserved but not yet seen: what shares the replica's steps."""


Policy = Callable[[Sequence[Candidate], random.Random], Candidate]


def most_headroom(candidates: Sequence[Candidate], rng: random.Random) -> Candidate:
    """The replica on which the most requests of this kind would still fit.

    Headroom counts in units of the request's own need, because blocks of two replicas are not comparable
    when their block sizes or budgets differ. Equal ones go to the replica with fewer requests.
    """
    return max(candidates, key=lambda c: (c.headroom_blocks / c.need_blocks, -c.requests, c.replica))


def least_loaded_of_two(candidates: Sequence[Candidate], rng: random.Random) -> Candidate:
    """Two drawn at random, the one with fewer requests: short requests want steps, not memory.

    Two and not all, so that many requests between two reports do not run to the same replica
    (Mitzenmacher, "The power of two choices in randomized load balancing", 2001).
    """
    pair = candidates if len(candidates) <= 2 else rng.sample(candidates, 2)
    return min(pair, key=lambda c: (c.requests, -c.headroom_blocks / c.need_blocks, c.replica))


POLICIES: dict[str, Policy] = {
    "most_headroom": most_headroom,
    "least_loaded_of_two": least_loaded_of_two,
}
