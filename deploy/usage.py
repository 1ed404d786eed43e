"""What every tier has used so far: sums of what the replicas count, kept when a replica goes."""

from collections.abc import Mapping

from deploy.messages import CapacityReport, Pace, TierUsage

# Of so many engines that are gone it is known what each has used: of one that comes back after more, it counts twice.
REMEMBERED_ENGINES = 1000


class UsageBook:
    """Replicas report totals since their engine's start, so the newest report of each engine says everything: of one
    that is gone, too, and of one that counted as gone and comes back."""

    def __init__(self) -> None:
        self._engines: dict[str, tuple[str, Mapping[str, TierUsage]]] = {}
        """Replica -> the epoch of its engine and the totals by tier."""
        self._gone: dict[tuple[str, str], Mapping[str, TierUsage]] = {}
        """The same of engines that are gone, by replica and epoch, the last gone last."""
        self._before: dict[str, TierUsage] = {}
        """Of those that were gone before."""
        self._of_gone: dict[str, TierUsage] = {}
        """Of both together: summed once, not whenever someone asks."""

    def observe(self, report: CapacityReport) -> None:
        """Take a report that the ledger has found to be newer than the last."""
        epoch, _ = self._engines.get(report.replica, (report.epoch, {}))
        if epoch != report.epoch:
            self.leave(report.replica)
        if self._gone.pop((report.replica, report.epoch), None) is not None:
            self._of_gone = _total(self._before, *self._gone.values())
        self._engines[report.replica] = (report.epoch, report.tiers)

    def leave(self, replica: str) -> None:
        """Its engine is gone; nothing happens where it has none."""
        if replica not in self._engines:
            return
        epoch, tiers = self._engines.pop(replica)
        self._gone[replica, epoch] = tiers
        _add(self._of_gone, tiers)
        if len(self._gone) > REMEMBERED_ENGINES:
            _add(self._before, self._gone.pop(next(iter(self._gone))))

    def totals(self) -> dict[str, TierUsage]:
        """By tier, over all engines that ever reported."""
        return _total(self._of_gone, *(tiers for _, tiers in self._engines.values()))


def _total(*engines: Mapping[str, TierUsage]) -> dict[str, TierUsage]:
    totals: dict[str, TierUsage] = {}
    for tiers in engines:
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
