"""How many requests a tenant has at once, and how many it began in the last minute. Plain code, clock passed in."""

import math
from collections import Counter
from dataclasses import dataclass

from replicas.headers import Answer

_FORGET_SECONDS = 1.0
"""How often the tenants are looked through."""


@dataclass(frozen=True)
class Allowance:
    """What one key may have of a replica; None: as much as it likes."""

    concurrent_requests: int | None = None
    requests_per_minute: int | None = None


def too_many_at_once(limit: int) -> str:
    return f"This key has {limit} requests at once already (concurrent_requests of its tier): wait until one ends."


class Turnstile:
    """Counts by tenant; forgets a tenant that has nothing running and a full minute left."""

    def __init__(self) -> None:
        self.inside: Counter[str] = Counter()
        self._spent: dict[str, tuple[float, float, float]] = {}
        """Tenant -> requests not yet paid back, when that was true, and when all of them will be. A minute pays back
        requests_per_minute."""
        self._forgotten_at = -math.inf

    def enter(self, tenant: str, allowance: Allowance) -> Answer | None:
        """Let a request in, to be told by `leave`; or the answer that keeps it out."""
        limit = allowance.concurrent_requests
        if limit is not None and self.inside[tenant] >= limit:
            return Answer(429, "TooManyRequestsError", too_many_at_once(limit), retry_after_seconds=1)
        self.inside[tenant] += 1
        return None

    def leave(self, tenant: str) -> None:
        self.inside[tenant] -= 1
        if not self.inside[tenant]:
            del self.inside[tenant]

    def begin(self, tenant: str, allowance: Allowance, now: float) -> Answer | None:
        """Charge one request to the tenant's minute, or the answer that refuses it."""
        limit = allowance.requests_per_minute
        if limit is None:
            return None
        spent, since, _ = self._spent.get(tenant, (0.0, now, now))
        spent = max(0.0, spent - (now - since) * limit / 60)
        if spent + 1 > limit:
            wait = max(1, round((spent + 1 - limit) * 60 / limit + 0.5))
            message = f"This key may begin {limit} requests a minute (requests_per_minute of its tier): wait {wait} s."
            return Answer(429, "TooManyRequestsError", message, retry_after_seconds=wait)
        self._spent[tenant] = (spent + 1, now, now + (spent + 1) * 60 / limit)
        if now - self._forgotten_at >= _FORGET_SECONDS:
            self._forgotten_at = now
            self._spent = {name: entry for name, entry in self._spent.items() if entry[2] > now}
        return None
