"""What every tier has used so far: sums of what the replicas count, kept when a replica goes."""

from collections.abc import Mapping

from deploy.messages import CapacityReport, Pace, TierUsage

# More than report at once: whoever is that long silent is gone.
REMEMBERED_ENGINES = 20_000


class UsageBook:
    """Replicas report totals since their engine's start, so the newest report of each engine says everything: of one
    that is gone, too, and of one that counted as gone and comes back."""

    def __init__(self) -> None:
        self._engines: dict[tuple[str, str], dict[str, TierUsage]] = {}
        """(replica, epoch) -> its totals by tier, the last heard of last."""
        self._before: dict[str, TierUsage] = {}
        """Of so many engines ago that none of them comes back."""

    def observe(self, report: CapacityReport) -> None:
        """Take a report that the ledger has found to be newer than the last."""
        engine = (report.replica, report.epoch)
        self._engines.pop(engine, None)
        self._engines[engine] = report.tiers
        if len(self._engines) > REMEMBERED_ENGINES:
            _add(self._before, self._engines.pop(next(iter(self._engines))))

    def totals(self) -> dict[str, TierUsage]:
        """By tier, over all engines that ever reported."""
        totals = dict(self._before)
        for tiers in self._engines.values():
            _add(totals, tiers)
        return totals


def _add(totals: dict[str, TierUsage], tiers: Mapping[str, TierUsage]) -> None:
    for tier, usage in tiers.items():
        totals[tier] = _sum(totals.get(tier, TierUsage()), usage)


def _sum(one: TierUsage, other: TierUsage) -> TierUsage:
    classes = one.pace.keys() | other.pace.keys()
    return TierUsage(
        requests=one.requests + other.requests,
        prompt_tokens=one.prompt_tokens + other.prompt_tokens,
        block_seconds=one.block_seconds + other.block_seconds,
        pace={c: _both(one.pace.get(c, Pace()), other.pace.get(c, Pace())) for c in classes},
    )


def _both(one: Pace, other: Pace) -> Pace:
    return Pace(
        output_tokens=one.output_tokens + other.output_tokens,
        first_token_seconds=one.first_token_seconds + other.first_token_seconds,
        first_token_counts=tuple(map(sum, zip(one.first_token_counts, other.first_token_counts, strict=True))),
        per_token_seconds=one.per_token_seconds + other.per_token_seconds,
        per_token_counts=tuple(map(sum, zip(one.per_token_counts, other.per_token_counts, strict=True))),
    )
