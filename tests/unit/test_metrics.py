"""The exposition: names, types, labels and values as Prometheus and the dashboards expect them."""

import json
import random
import re
from dataclasses import asdict

import pytest
from prometheus_client.parser import text_string_to_metric_families

from deploy import metrics
from deploy.admission import Admission
from deploy.exposition import render
from deploy.messages import Demand, GpuReading
from deploy.metrics import METRICS
from deploy.settings import CoordinatorSettings
from tests.unit.reports import report


@pytest.fixture
def core():
    made = Admission(CoordinatorSettings(watermark_blocks=3), random.Random(0))
    counters = {"compactions": 7, "freed_blocks": 40, "evicted_tokens": 900, "preemptions": 2}
    gpu = GpuReading(2, 160 << 30, 140 << 30, power_watts=600.0, energy_joules=1234.5)
    made.observe(report("a", held={"old": 10}, running=1, peak_blocks_per_request=12, gpu=gpu, **counters), 0)
    made.observe(report("b"), 0)
    made.submit(Demand("long", 100, 2000), 0)
    made.submit(Demand("never", 100, 99_999), 0)
    made.submit(Demand("waits", 100, 3100), 0)
    return made


@pytest.fixture
def families(core):
    return {family.name: family for family in text_string_to_metric_families(exposition(core))}


def exposition(core):
    return render(core.snapshot(0.5), "tiny").decode()


def values(families, metric):
    family = families[metric.name.removesuffix("_total")]
    return {tuple(sorted(s.labels.items())): s.value for s in family.samples}


def of(families, metric, **labels):
    return values(families, metric)[tuple(sorted({"model": "tiny", **labels}.items()))]


def test_every_metric_is_exposed_with_its_type_and_its_help_and_no_other(families):
    assert set(families) == {metric.name.removesuffix("_total") for metric in METRICS}
    for metric in METRICS:
        family = families[metric.name.removesuffix("_total")]
        assert (family.type, family.documentation) == (metric.kind, metric.help)
        assert family.samples, f"{metric.name} has no series"


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_names_follow_prometheus(metric):
    assert re.fullmatch(r"(triattention|trifleet)_[a-z]+(_[a-z]+)*", metric.name)
    assert metric.name.endswith("_total") == (metric.kind == "counter")
    assert not metric.name.endswith(("_count", "_sum", "_bucket", "_info"))
    assert metric.help.endswith(".")


def test_labels_are_those_declared_and_never_a_request(families):
    for metric in METRICS:
        for sample in families[metric.name.removesuffix("_total")].samples:
            assert set(sample.labels) - {"le"} == set(metric.labels)
    assert {label for metric in METRICS for label in metric.labels} == {
        "model", "replica", "reason", "class", "tier"
    }  # fmt: skip


def test_ten_thousand_requests_make_no_new_series():
    """Placed, queued, refused, finished, expired, on a replica that reports all along."""
    core = Admission(CoordinatorSettings(queue_length=4), random.Random(0))
    core.observe(report("b"), 0)

    def series(text):
        return {line.rpartition(" ")[0] for line in text.splitlines() if not line.startswith("#")}

    before = series(exposition(core))
    for i in range(10_000):
        now, name = 1 + i / 100, f"request {i}"
        core.submit(Demand(name, 100, (200, 3000, 99_999)[i % 3]), now)
        core.observe(report("b", i + 2, held={name: 3} if i % 3 == 0 else {}, finished=(f"request {i - 6}",)), now)
        core.tick(now)
    text = exposition(core)
    assert series(text) == before
    assert "request" not in re.sub("(?m)^#.*|requests_per_minute|_request(s|_[a-z]+)?", "", text)
    placed = sum(sum(reasons.values()) for reasons in core.snapshot(200).placements.values())
    assert placed > 3000


def test_gpus_are_shown_where_they_are_read_and_nowhere_else(families):
    assert values(families, metrics.GPU_ENERGY_JOULES) == {(("model", "tiny"), ("replica", "a")): 1234.5}
    assert values(families, metrics.GPU_POWER_WATTS) == {(("model", "tiny"), ("replica", "a")): 600}
    assert of(families, metrics.GPU_MEMORY_USED_BYTES, replica="a") == 140 << 30
    assert of(families, metrics.GPUS, replica="a") == 2


def test_a_gpu_that_tells_no_power_has_no_series_of_it(core):
    core.observe(report("b", 2, gpu=GpuReading(1, 80, 40, power_watts=None, energy_joules=None)), 1)
    lines = [line for line in exposition(core).splitlines() if 'replica="b"' in line and "triattention_gpu" in line]
    assert sorted(line.split("{")[0] for line in lines) == [
        "triattention_gpu_memory_bytes", "triattention_gpu_memory_used_bytes", "triattention_gpus",
    ]  # fmt: skip


def test_engine_counters_are_those_of_the_report(families):
    assert of(families, metrics.COMPACTIONS, replica="a") == 7
    assert of(families, metrics.FREED_BLOCKS, replica="a") == 40
    assert of(families, metrics.RECLAIMED_BYTES, replica="a") == 40 * 1024
    assert of(families, metrics.EVICTED_TOKENS, replica="a") == 900
    assert of(families, metrics.STRANDED_SLOTS, replica="a") == 0
    assert of(families, metrics.PREEMPTIONS, replica="a") == 2
    assert of(families, metrics.PEAK_BLOCKS_PER_REQUEST, replica="a") == 12


def test_blocks_of_a_replica_add_up(families):
    for replica in ("a", "b"):
        total, free, held, reserved, predicted, headroom = (
            of(families, metric, replica=replica)
            for metric in (
                metrics.TOTAL_BLOCKS, metrics.FREE_BLOCKS, metrics.HELD_BLOCKS,
                metrics.RESERVED_BLOCKS, metrics.PREDICTED_BLOCKS, metrics.HEADROOM_BLOCKS,
            )
        )  # fmt: skip
        assert total == free + held
        assert headroom == free - reserved - predicted - 3
    assert of(families, metrics.RESERVED_BLOCKS, replica="b") == 63


def test_decisions_are_counted(families):
    assert of(families, metrics.ADMISSIONS, tier="default") == 1
    assert of(families, metrics.PLACEMENTS, replica="b", reason="most_headroom") == 1
    assert of(families, metrics.PLACEMENTS, replica="a", reason="most_headroom") == 0
    assert of(families, metrics.REJECTIONS, tier="default", reason="over_max_model_len") == 1
    assert of(families, metrics.REJECTIONS, tier="default", reason="queue_full") == 0
    assert of(families, metrics.QUEUE_LENGTH, tier="default", **{"class": "long"}) == 1
    assert of(families, metrics.REPORT_AGE, replica="a") == 0.5


def test_the_wait_histogram_counts_everything_up_to_each_bound(core):
    core.observe(report("b", 2, finished=("long",)), 4)
    samples = [
        s
        for family in text_string_to_metric_families(exposition(core))
        for s in family.samples
        if s.name.startswith(metrics.QUEUE_WAIT.name) and s.labels["class"] == "long"
    ]
    buckets = {s.labels["le"]: s.value for s in samples if "le" in s.labels}
    assert (buckets["0.001"], buckets["2.5"], buckets["5.0"], buckets["+Inf"]) == (1, 1, 2, 2)
    assert [s.value for s in samples if s.name.endswith("_sum")] == [4]


def test_the_series_of_a_removed_replica_disappear(core):
    core.remove_replica("a", 1)
    assert 'replica="a"' not in exposition(core)


def test_a_snapshot_can_be_sent_as_json(core):
    assert json.loads(json.dumps(asdict(core.snapshot(0))))["replicas"][0]["replica"] == "a"
