"""The same metrics through Ray's own export, which every node of a Ray cluster serves and a PodMonitor scrapes.

Ray puts `ray_` before every name and labels of its own behind; docs/observability.md has the scrape configuration
that takes both off again, so that dashboards and rules find one set of names.

Every sample becomes a Ray gauge, counters and histograms too: Ray's counters cannot begin at 0 and never forget a
replica that is gone, and its histograms only estimate their sums. A gauge's value arrives as it is, and vanishes
soon after it was last set. PromQL does not look at types.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping

from prometheus_client import Metric
from ray.util.metrics import Gauge

logger = logging.getLogger("ray.serve")

# Ray collects every 10 s and forgets a gauge that was not set for 20 s.
EXPORT_SECONDS = 5.0

Families = Callable[[], Iterable[Metric]]


class RayExport:
    """Sets one Ray gauge per sample of the families that `read` gives at each round, with these labels added."""

    def __init__(self, read: Families, labels: Mapping[str, str] | None = None) -> None:
        self._read = read
        self._labels = dict(labels or {})
        self._gauges: dict[str, Gauge] = {}

    def push(self, families: Iterable[Metric]) -> None:
        for family in families:
            for sample in family.samples:
                if sample.name.endswith("_created"):
                    continue
                labels = {**self._labels, **sample.labels}
                gauge = self._gauges.get(sample.name)
                if gauge is None:
                    # OpenTelemetry, which Ray exports through, takes no colons: vllm:x becomes vllm_x.
                    name = sample.name.replace(":", "_")
                    gauge = self._gauges[sample.name] = Gauge(name, family.documentation, tuple(labels))
                gauge.set(sample.value, tags=labels)

    async def run(self) -> None:
        """Until cancelled. Whatever goes wrong here must not touch what serves requests."""
        while True:
            try:
                # Five microseconds a sample add up in a large fleet: not on the event loop.
                await asyncio.to_thread(self.push, list(self._read()))
            except Exception as error:
                logger.warning("Metrics do not get through to Ray (%r); trying again.", error)
            await asyncio.sleep(EXPORT_SECONDS)
