"""The fleet's usage by tier out of the replicas' totals."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.messages import Pace, TierUsage
from deploy.usage import UsageBook, _grown
from tests.unit.reports import report


def say(replica, requests, epoch="first"):
    pace = {"long": Pace(first_token_seconds=requests * 2.0)}
    usage = TierUsage(requests=requests, block_seconds=requests / 2, pace=pace)
    return replace(report(replica, epoch=epoch), tiers={"gold": usage})


def test_the_newest_totals_of_all_replicas_add_up():
    book = UsageBook()
    for made in (say("a", 0), say("b", 0)):
        book.observe(made)
    for made in (say("a", 3), say("a", 5), say("b", 7)):
        book.observe(made)
    assert book.totals()["gold"].requests == 12
    assert book.totals()["gold"].block_seconds == 6
    assert book.totals()["gold"].pace["long"].first_token_seconds == 24


def test_nothing_is_lost_when_an_engine_starts_anew_or_a_replica_goes():
    book = UsageBook()
    for made in (say("a", 0), say("a", 5), say("a", 0, epoch="second"), say("a", 1, epoch="second")):
        book.observe(made)
    for made in (say("b", 0), say("b", 2)):
        book.observe(made)
    assert book.totals()["gold"].requests == 8


def test_what_engines_had_used_before_the_coordinator_started_counts_once():
    """`increase` takes a counter that fell for one that began at 0: what it then shows was used since."""
    before = UsageBook()
    for made in (say("a", 0), say("a", 5), say("b", 0), say("b", 10)):
        before.observe(made)
    assert before.totals()["gold"].requests == 15
    restarted = UsageBook()  # replica a is gone, b is not
    restarted.observe(say("b", 11))
    assert restarted.totals().get("gold", TierUsage()) == TierUsage()
    restarted.observe(say("b", 13))
    assert restarted.totals()["gold"].requests == 2
    assert restarted.totals()["gold"].pace["long"].first_token_seconds == 4


def test_an_engine_that_counted_as_gone_and_comes_back_counts_once():
    book = UsageBook()
    for made in (say("a", 0), say("a", 5), say("a", 0, epoch="second"), say("a", 1, epoch="second"), say("a", 6)):
        book.observe(made)
    assert book.totals()["gold"].requests == 7


def test_the_oldest_of_many_engines_still_count(monkeypatch):
    monkeypatch.setattr("deploy.usage.REMEMBERED_ENGINES", 3)
    book = UsageBook()
    for number in range(10):
        book.observe(say("a", 0, epoch=str(number)))
        book.observe(say("a", 1, epoch=str(number)))
        book.totals()
    book.observe(say("a", 2, epoch="8"))
    assert book.totals()["gold"].requests == 11


REPORTS = st.tuples(st.sampled_from("abc"), st.sampled_from(["first", "second"]), st.floats(0, 1e6))


@given(st.lists(REPORTS, max_size=30))
def test_totals_never_fall(reports):
    """A counter that falls by a rounding error looks like one that began anew."""
    book, used, before = UsageBook(), {}, 0.0
    for replica, epoch, seconds in reports:
        if (replica, epoch) not in used:
            book.observe(say(replica, 0, epoch))
        used[replica, epoch] = used.get((replica, epoch), 0.0) + seconds
        book.observe(say(replica, 2 * used[replica, epoch], epoch))
        total = book.totals()["gold"].block_seconds
        assert total >= before
        before = total
    assert before == pytest.approx(sum(used.values()))


def test_only_what_was_reported_since_is_added(monkeypatch):
    added = []
    monkeypatch.setattr("deploy.usage._grown", lambda *usages, add=_grown: added.append(1) or add(*usages))
    book = UsageBook()
    for number in range(100):
        book.observe(say(f"replica {number}", 0))
        book.observe(say(f"replica {number}", 1))
    assert book.totals()["gold"].requests == 100
    added.clear()
    book.observe(say("replica 3", 2))
    assert book.totals()["gold"].requests == 101
    assert len(added) == 1
