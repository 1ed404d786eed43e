"""What every tier has used since the coordinator's start: sums of what the replicas count, kept when one goes."""

from collections.abc import Mapping

from deploy.messages import CapacityReport, Pace, TierUsage

# Of so many engines, the last heard of, it is known what each used; one that comes back after more counts from then.
REMEMBERED_ENGINES = 10_000


class UsageBook:
    """Replicas report totals since their engine's start, so of each engine what has been added since it was last looked
    at goes on top: also of one that counted as gone and comes back. What an engine had used when it was first heard of
    is not counted: a new one has used nothing, and of one that is older than this book Prometheus has seen it already
    and, as the sums begin anew, would count it twice. Nothing is ever taken away, because a counter that falls by a
    rounding error looks like one that began anew, too."""

    def __init__(self) -> None:
        self._newest: dict[tuple[str, str], Mapping[str, TierUsage]] = {}
        """Replica and epoch of its engine -> the totals by tier; the last heard of last."""
        self._counted: dict[tuple[str, str], Mapping[str, TierUsage]] = {}
        """What of them is in the sums, or was used before."""
        self._totals: dict[str, TierUsage] = {}

    def observe(self, report: CapacityReport) -> None:
        """Take a report that the ledger has found to be newer than the last."""
        engine = (report.replica, report.epoch)
        self._newest.pop(engine, None)
        self._newest[engine] = report.tiers
        self._counted.setdefault(engine, report.tiers)

    def totals(self) -> dict[str, TierUsage]:
        """By tier, over all engines that reported, from their first report on."""
        for engine, tiers in self._newest.items():
            counted = self._counted[engine]
            if tiers is not counted:
                self._counted[engine] = tiers
                for tier, usage in tiers.items():
                    since = counted.get(tier, TierUsage())
                    self._totals[tier] = _grown(self._totals.get(tier, TierUsage()), since, usage)
        while len(self._newest) > REMEMBERED_ENGINES:
            engine = next(iter(self._newest))
            del self._newest[engine], self._counted[engine]
        return dict(self._totals)


def _grown(total: TierUsage, since: TierUsage, usage: TierUsage) -> TierUsage:
    """The total and what has come to `usage` since."""
    nothing = Pace()
    return TierUsage(
        requests=total.requests + usage.requests - since.requests,
        prompt_tokens=total.prompt_tokens + usage.prompt_tokens - since.prompt_tokens,
        block_seconds=total.block_seconds + (usage.block_seconds - since.block_seconds),
        pace=total.pace
        | {
            c: _pace_grown(total.pace.get(c, nothing), since.pace.get(c, nothing), pace)
            for c, pace in usage.pace.items()
        },
    )


def _pace_grown(total: Pace, since: Pace, pace: Pace) -> Pace:
    return Pace(
        output_tokens=total.output_tokens + pace.output_tokens - since.output_tokens,
        first_token_seconds=total.first_token_seconds + (pace.first_token_seconds - since.first_token_seconds),
        first_token_counts=_counts_grown(total.first_token_counts, since.first_token_counts, pace.first_token_counts),
        per_token_seconds=total.per_token_seconds + (pace.per_token_seconds - since.per_token_seconds),
        per_token_counts=_counts_grown(total.per_token_counts, since.per_token_counts, pace.per_token_counts),
    )


def _counts_grown(total: tuple[int, ...], since: tuple[int, ...], counts: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(t + new - old for t, old, new in zip(total, since, counts, strict=True))
