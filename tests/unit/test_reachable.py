"""Which replicas every router can send to."""

from hypothesis import given
from hypothesis import strategies as st

from deploy.reachable import ROUTER_GONE_SECONDS, Reachable


def test_a_replica_counts_once_every_router_has_told_it():
    reachable = Reachable()
    assert reachable.hear("n1", frozenset({"a", "b"}), 0)
    assert reachable.by_all == {"a", "b"}
    reachable.hear("n2", frozenset({"a"}), 0)
    assert reachable.by_all == {"a"}
    reachable.hear("n2", frozenset({"a", "b"}), 1)
    assert reachable.by_all == {"a", "b"}


def test_a_router_that_tells_of_no_change_still_has_its_say():
    reachable = Reachable()
    reachable.hear("n1", frozenset({"a"}), 0)
    for now in range(1, 9):
        assert reachable.hear("n1", None, now)
        reachable.hear("n2", frozenset({"a", "b"}), now)
    assert reachable.by_all == {"a"}


def test_a_router_that_is_not_known_has_to_tell_its_replicas():
    assert not Reachable().hear("n1", None, 0)


def test_a_router_that_is_gone_has_no_say_and_is_forgotten():
    reachable = Reachable()
    for number in range(10):
        reachable.hear(f"gone {number}", frozenset({"a"}), 0)
    reachable.hear("n1", frozenset({"a", "b"}), 1)
    assert reachable.by_all == {"a"}
    reachable.hear("n1", None, ROUTER_GONE_SECONDS + 0.1)
    assert reachable.by_all == {"a", "b"}
    assert not reachable.hear("gone 1", None, ROUTER_GONE_SECONDS + 0.1)


CALLS = st.tuples(
    st.sampled_from(["n1", "n2", "n3"]),
    st.none() | st.frozensets(st.sampled_from("abcd")),
    st.floats(0, ROUTER_GONE_SECONDS),
)


@given(st.lists(CALLS, max_size=30))
def test_it_is_what_the_sets_of_all_routers_that_are_there_have_in_common(calls):
    reachable, told, now = Reachable(), {}, 0.0
    for node, replicas, seconds in calls:
        now += seconds
        if reachable.hear(node, replicas, now):
            told[node] = (told[node][0] if replicas is None else replicas, now)
            told = {name: entry for name, entry in told.items() if now - entry[1] <= ROUTER_GONE_SECONDS}
            assert reachable.by_all == frozenset.intersection(*(entry[0] for entry in told.values()))
