"""What every tier has used so far: sums of what the replicas count, kept when a replica goes."""

from deploy.messages import CapacityReport, Pace, TierUsage


class UsageBook:
    """Replicas report totals since their engine's start, so the newest report of each says everything."""

    def __init__(self) -> None:
        self._current: dict[str, tuple[str, dict[str, TierUsage]]] = {}
        """Replica -> its epoch and its totals by tier."""
        self._past: dict[str, TierUsage] = {}
        """Of engines that are gone."""

    def observe(self, report: CapacityReport) -> None:
        """Take a report that the ledger has found to be newer than the last."""
        last = self._current.get(report.replica)
        if last is not None and last[0] != report.epoch:
            self.remove(report.replica)
        self._current[report.replica] = (report.epoch, report.tiers)

    def remove(self, replica: str) -> None:
        _, totals = self._current.pop(replica, ("", {}))
        for tier, usage in totals.items():
            self._past[tier] = _sum(self._past.get(tier, TierUsage()), usage)

    def totals(self) -> dict[str, TierUsage]:
        """By tier, over all engines that ever reported."""
        totals = dict(self._past)
        for _, tiers in self._current.values():
            for tier, usage in tiers.items():
                totals[tier] = _sum(totals.get(tier, TierUsage()), usage)
        return totals


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
