"""Which replicas every router can send to, from what each tells. Plain code, clock passed in.

Each node's HAProxy learns of a replica by itself, and requests come in at all of them. So a router tells its set when
that changes and else only that it is there: with a router for each replica, sets cost their square.
"""

from collections import Counter

# Routers tell four times a second; one that is silent for so long has no say in where requests go.
ROUTER_GONE_SECONDS = 3.0


class Reachable:
    def __init__(self) -> None:
        self.by_all: frozenset[str] | None = None
        """The replicas that all routers told, silent routers left out; None before the first has told."""
        self._told: dict[str, tuple[frozenset[str], float]] = {}
        """By router: what it last told, and when it was last heard; the last heard last."""
        self._routers: Counter[str] = Counter()
        """By replica: how many told it."""

    def hear(self, router: str, replicas: frozenset[str] | None, now: float) -> bool:
        """It can send to these, or, None, to those that it told before. False: it has to tell them, as they are
        not known."""
        before = self._told.pop(router, (None, now))[0]
        told = before if replicas is None else replicas
        if told is None:
            return False
        is_changed = told != before
        if is_changed:
            self._count(before or frozenset(), told)
        self._told[router] = (told, now)
        while now - self._told[first := next(iter(self._told))][1] > ROUTER_GONE_SECONDS:
            self._count(self._told.pop(first)[0], frozenset())
            is_changed = True
        if is_changed:
            self.by_all = frozenset(replica for replica, n in self._routers.items() if n == len(self._told))
        return True

    def _count(self, before: frozenset[str], after: frozenset[str]) -> None:
        for replica in after - before:
            self._routers[replica] += 1
        for replica in before - after:
            self._routers[replica] -= 1
            if not self._routers[replica]:
                del self._routers[replica]
