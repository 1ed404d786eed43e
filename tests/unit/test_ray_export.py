"""The export through Ray, against a fake of Ray's gauge; tests/fleet reads the real one off a node."""

import asyncio

import pytest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

from replicas import ray_export
from replicas.ray_export import RayExport


class FakeGauge:
    """Stands in for ray.util.metrics.Gauge: remembers what it was set to."""

    made: dict[str, "FakeGauge"]

    def __init__(self, name, description, tag_keys):
        assert name not in self.made, "one gauge per name"
        self.made[name] = self
        self.description = description
        self.tag_keys = tag_keys
        self.values = {}

    def set(self, value, tags):
        assert set(tags) == set(self.tag_keys)
        self.values[tuple(tags.values())] = value


@pytest.fixture(autouse=True)
def gauges(monkeypatch):
    FakeGauge.made = {}
    monkeypatch.setattr(ray_export, "Gauge", FakeGauge)
    return FakeGauge.made


def families():
    counter = CounterMetricFamily("vllm:tokens", "Tokens.", labels=("engine",))
    counter.add_metric(("0",), 0, created=1.0)
    yield counter
    gauge = GaugeMetricFamily("trifleet_free_blocks", "Free.", labels=("replica",))
    gauge.add_metric(("a",), 3)
    gauge.add_metric(("b",), 4)
    yield gauge
    histogram = HistogramMetricFamily("trifleet_wait_seconds", "Wait.", labels=("class",))
    histogram.add_metric(("long",), [("1.0", 2), ("+Inf", 5)], 17.5)
    yield histogram


def test_every_sample_arrives_as_it_is_under_its_own_name(gauges):
    export = RayExport(families)
    export.push(families())
    export.push(families())
    assert {name: gauge.values for name, gauge in gauges.items()} == {
        "vllm_tokens_total": {("0",): 0},
        "trifleet_free_blocks": {("a",): 3, ("b",): 4},
        "trifleet_wait_seconds_bucket": {("long", "1.0"): 2, ("long", "+Inf"): 5},
        "trifleet_wait_seconds_count": {("long",): 5},
        "trifleet_wait_seconds_sum": {("long",): 17.5},
    }
    assert gauges["trifleet_free_blocks"].description == "Free."


def test_labels_of_the_exporter_come_with_every_sample(gauges):
    RayExport(families, {"pod": "p"}).push(families())
    assert gauges["trifleet_free_blocks"].values == {("p", "a"): 3, ("p", "b"): 4}


async def test_a_failing_round_does_not_end_the_export(gauges, monkeypatch):
    monkeypatch.setattr(ray_export, "EXPORT_SECONDS", 0.01)
    rounds = iter(range(100))
    third = asyncio.Event()

    def read():
        number = next(rounds)
        if number == 0:
            raise RuntimeError("no report yet")
        if number == 2:
            third.set()
        return families()

    running = asyncio.create_task(RayExport(read).run())
    await asyncio.wait_for(third.wait(), 10)
    running.cancel()
    assert "trifleet_free_blocks" in gauges
