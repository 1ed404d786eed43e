"""What each request takes of the engine: KV block-seconds and tokens, per request and summed by tier.

Owns the accounts of the requests on this replica. Told of every engine report, so block-seconds are exact to the
time between two of them (20 ms). Plain code, the clock is passed in.
"""

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from replicas.headers import reservation_of
from replicas.messages import FIRST_TOKEN_BUCKETS_SECONDS, PER_TOKEN_BUCKETS_SECONDS, Pace, TierUsage

# The engine tells a request's tokens with its next report: a request of which it tells nothing never got there.
LATEST_COUNT_SECONDS = 1.0


@dataclass
class _Account:
    tier: str
    length_class: str
    arrived_at: float
    """At the router, on this replica's clock."""
    counted_to: float
    held_blocks: int = 0
    block_seconds: float = 0.0
    first_token_seconds: float | None = None
    per_token_seconds: list[float] = field(default_factory=list)
    finished_at: float | None = None
    is_told: bool = False
    """A report from after its end has told its tokens."""
    prompts: dict[str, int] = field(default_factory=dict)
    """Prompt -> its tokens: the sequences of one prompt (n > 1) share it."""
    output_tokens: int = 0

    def count(self, held_blocks: int, now: float) -> None:
        self.block_seconds += self.held_blocks * (now - self.counted_to)
        self.held_blocks, self.counted_to = held_blocks, now


class Meter:
    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._accounts: dict[str, _Account] = {}
        self._tiers: dict[str, TierUsage] = {}

    def begin(self, reservation: str, tier: str, length_class: str, waited_seconds: float) -> None:
        """`waited_seconds`: what has passed since the request reached the router."""
        now = self._clock()
        self._accounts[reservation] = _Account(tier, length_class, arrived_at=now - waited_seconds, counted_to=now)

    def observe(self, held_blocks: Mapping[str, int], ended: Mapping[str, Sequence[int]]) -> None:
        """An engine report.

        `held_blocks`: reservation -> blocks now. `ended`: vLLM's request id -> prompt and output tokens of the
        sequences that ended since the last report.
        """
        now = self._clock()
        for request, (prompt, output) in ended.items():
            known = self._accounts.get(reservation_of(request) or "")
            if known is not None:
                # With n > 1 vLLM puts the sequence's number and _ before the prompt's id.
                known.prompts[request.partition("_")[2] or request] = prompt
                known.output_tokens += output
        for reservation, account in self._accounts.items():
            account.count(held_blocks.get(reservation, 0), now)
            if account.finished_at is not None and reservation not in held_blocks:
                account.is_told = bool(account.prompts)

    def answered(self, reservation: str) -> None:
        """The first byte of the answer is on its way."""
        account = self._accounts.get(reservation)
        if account is not None and account.first_token_seconds is None:
            account.first_token_seconds = self._clock() - account.arrived_at

    def decoded(self, request: str, seconds_per_token: float) -> None:
        """A sequence has ended that took so long for each output token after its first. `request`: vLLM's id."""
        account = self._accounts.get(reservation_of(request) or "")
        if account is not None:
            account.per_token_seconds.append(seconds_per_token)

    def usage(self, reservation: str) -> tuple[str, float]:
        """The tier and the block-seconds so far of a request that has begun."""
        account = self._accounts[reservation]
        account.count(account.held_blocks, self._clock())
        return account.tier, account.block_seconds

    def finish(self, reservation: str) -> float:
        """The request is over. The block-seconds that it took."""
        _, block_seconds = self.usage(reservation)
        account = self._accounts[reservation]
        account.held_blocks = 0
        account.finished_at = self._clock()
        return block_seconds

    def tiers(self) -> dict[str, TierUsage]:
        """Sums over the requests that are over, by tier."""
        now = self._clock()
        for reservation, account in list(self._accounts.items()):
            if account.finished_at is None:
                continue
            if account.is_told or now - account.finished_at > LATEST_COUNT_SECONDS:
                del self._accounts[reservation]
                self._tiers[account.tier] = _added(self._tiers.get(account.tier, TierUsage()), account)
        return dict(self._tiers)


def _added(usage: TierUsage, account: _Account) -> TierUsage:
    pace = _measured(usage.pace.get(account.length_class, Pace()), account)
    return replace(
        usage,
        requests=usage.requests + 1,
        prompt_tokens=usage.prompt_tokens + sum(account.prompts.values()),
        block_seconds=usage.block_seconds + account.block_seconds,
        pace={**usage.pace, account.length_class: pace},
    )


def _measured(pace: Pace, account: _Account) -> Pace:
    first = account.first_token_seconds
    first_counts, per_token_counts = list(pace.first_token_counts), list(pace.per_token_counts)
    if first is not None:
        first_counts[bisect_left(FIRST_TOKEN_BUCKETS_SECONDS, first)] += 1
    for seconds in account.per_token_seconds:
        per_token_counts[bisect_left(PER_TOKEN_BUCKETS_SECONDS, seconds)] += 1
    return Pace(
        output_tokens=pace.output_tokens + account.output_tokens,
        first_token_seconds=pace.first_token_seconds + (first or 0.0),
        first_token_counts=tuple(first_counts),
        per_token_seconds=pace.per_token_seconds + sum(account.per_token_seconds),
        per_token_counts=tuple(per_token_counts),
    )
