"""How many replicas there should be."""

from concurrent.futures import Future
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.autoscaling import BlockPolicy, serve_config, wanted_replicas
from deploy.messages import FleetLoad
from deploy.settings import Autoscaling, SettingsError, parse_settings

SETTINGS = Autoscaling(min_replicas=1, max_replicas=10, target_utilization=0.8)


def load(replicas, committed, queued=0):
    return FleetLoad(replicas, replicas * 100, committed, queued)


@pytest.mark.parametrize(
    ("now", "committed", "queued", "wanted"),
    [
        (1, 0, 0, 1),
        (1, 80, 0, 1),
        (1, 81, 0, 2),
        (1, 90, 300, 5),  # who waits counts
        (3, 10, 0, 1),
        (3, 100, 0, 2),
        (3, 10, 5, 3),  # while anybody waits none goes
        (3, 5000, 0, 10),  # never beyond max_replicas
    ],
)
def test_committed_and_queued_blocks_against_capacity(now, committed, queued, wanted):
    assert wanted_replicas(load(now, committed, queued), now, SETTINGS) == wanted


@given(
    st.integers(1, 20), st.integers(0, 3000), st.integers(0, 3000), st.integers(1, 4), st.floats(0.05, 1.0)
)  # fmt: skip
def test_scale_down_leaves_room_for_what_runs(now, committed, queued, gang, target):
    settings = Autoscaling(min_replicas=gang, max_replicas=100 * gang, target_utilization=target, gang_size=gang)
    wanted = wanted_replicas(load(now, committed, queued), now, settings)
    assert wanted % gang == 0
    if wanted < now:
        assert queued == 0
        assert wanted * 100 * target >= committed - 1e-6


def test_nothing_changes_while_no_replica_reports():
    assert wanted_replicas(FleetLoad(0, 0, 0, 7), 4, SETTINGS) == 4


def answered(value):
    question = Future()
    question.set_result(value)
    return question


def policy(monkeypatch, answers, **settings):
    """The policy before a coordinator that gives these answers."""
    asked = []

    def ask(wanted):
        asked.append(wanted)
        return SimpleNamespace(future=lambda: answers.pop(0))

    actor = SimpleNamespace(load=SimpleNamespace(remote=ask))
    monkeypatch.setattr("deploy.autoscaling.ray.get_actor", lambda name, namespace: actor)
    values = {"max_replicas": 10, "target_utilization": 0.8, **settings}
    return BlockPolicy(values, ["coordinator", "trifleet"]), asked


def test_the_policy_answers_from_the_last_word_and_never_waits(monkeypatch):
    silent = Future()
    made, asked = policy(monkeypatch, [answered(load(2, 300)), silent])
    context = SimpleNamespace(target_num_replicas=2)
    assert made(context) == (2, {})  # nothing heard yet
    assert made(context) == (4, {})
    assert made(context) == (4, {})  # the second question is open, the first answer still stands
    assert asked == [2, 4]


def test_a_dry_run_only_says_what_it_would_do(monkeypatch, caplog):
    made, asked = policy(monkeypatch, [answered(load(2, 300)), answered(load(2, 300))], dry_run=True)
    context = SimpleNamespace(target_num_replicas=2)
    made(context)
    with caplog.at_level("INFO", "ray.serve"):
        caplog.handler.setLevel("INFO")
        monkeypatch.setattr("deploy.autoscaling.logger.propagate", True)
        assert made(context) == (2, {})
    assert "would scale from 2 to 4 replicas" in caplog.text
    assert asked[-1] == 4


def test_serve_gets_the_limits_and_delays():
    settings = Autoscaling(min_replicas=2, max_replicas=6, upscale_delay_seconds=3, downscale_delay_seconds=40)
    config = serve_config(settings, 1, ("coordinator", "trifleet"))
    assert (config.min_replicas, config.initial_replicas, config.max_replicas) == (2, 2, 6)
    assert (config.upscale_delay_s, config.downscale_delay_s) == (3, 40)
    assert isinstance(BlockPolicy(**config.policy.policy_kwargs), BlockPolicy)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"max_replicas": 1, "min_replicas": 2}, "max_replicas is 1 but min_replicas is 2"),
        (
            {"max_replicas": 6, "min_replicas": 4, "gang_size": 4},
            "is 6, which is no multiple of gang_size 4",
        ),
        ({"max_replica": 6}, "did you mean max_replicas?"),
    ],
)
def test_mistakes_are_sentences(values, sentence):
    with pytest.raises(SettingsError, match="autoscaling") as caught:
        parse_settings({"served_model_name": "m", "autoscaling": values})
    assert sentence in str(caught.value)
