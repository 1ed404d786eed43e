"""Which replicas have probably cached the beginning of a prompt: where requests that begin alike were sent.

Only a hint, for ties in placement: a replica may have evicted what it computed, and nothing is booked on the strength
of it. Prompts are compared by hashes of their first 1, 2, 4, ... KiB of text, as the router makes them.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable

SHORTEST_PREFIX = 1024
LONGEST_PREFIX = 65_536
REMEMBERED_PREFIXES = 50_000
REPLICAS_PER_PREFIX = 4


def prefix_hashes(text: str) -> tuple[int, ...]:
    """Hashes of the text's first 1,024, 2,048, ... characters, as far as it goes; none for a shorter text."""
    hashes = []
    length = SHORTEST_PREFIX
    while length <= min(len(text), LONGEST_PREFIX):
        digest = hashlib.blake2b(text[:length].encode(errors="surrogatepass"), digest_size=8)
        hashes.append(int.from_bytes(digest.digest()))
        length *= 2
    return tuple(hashes)


class PrefixIndex:
    """Prefix -> the replicas that computed it last. The prefixes used longest ago are forgotten."""

    def __init__(self) -> None:
        self._replicas_of: OrderedDict[int, tuple[str, ...]] = OrderedDict()

    def note(self, prefix: Iterable[int], replica: str) -> None:
        """A prompt that begins with these is computed there."""
        for one in prefix:
            others = (other for other in self._replicas_of.get(one, ()) if other != replica)
            self._replicas_of[one] = (replica, *others)[:REPLICAS_PER_PREFIX]
            self._replicas_of.move_to_end(one)
        while len(self._replicas_of) > REMEMBERED_PREFIXES:
            self._replicas_of.popitem(last=False)

    def shared(self, prefix: tuple[int, ...]) -> dict[str, int]:
        """Replica -> how many of the prefixes it has, from the shortest on."""
        found: dict[str, int] = {}
        for depth, one in enumerate(prefix, start=1):
            replicas = self._replicas_of.get(one)
            if replicas is None:
                break
            found.update(dict.fromkeys(replicas, depth))
        return found
