"""The fleet's usage by tier out of the replicas' totals."""

from dataclasses import replace

from deploy.messages import Pace, TierUsage
from deploy.usage import UsageBook, _sum
from tests.unit.reports import report


def say(replica, requests, epoch="first"):
    pace = {"long": Pace(first_token_seconds=requests * 2.0)}
    usage = TierUsage(requests=requests, block_seconds=requests / 2, pace=pace)
    return replace(report(replica, epoch=epoch), tiers={"gold": usage})


def test_the_newest_totals_of_all_replicas_add_up():
    book = UsageBook()
    for made in (say("a", 3), say("a", 5), say("b", 7)):
        book.observe(made)
    assert book.totals()["gold"].requests == 12
    assert book.totals()["gold"].block_seconds == 6
    assert book.totals()["gold"].pace["long"].first_token_seconds == 24


def test_nothing_is_lost_when_an_engine_starts_anew_or_a_replica_goes():
    book = UsageBook()
    book.observe(say("a", 5))
    book.observe(say("a", 1, epoch="second"))
    book.observe(say("b", 2))
    assert book.totals()["gold"].requests == 8


def test_an_engine_that_counted_as_gone_and_comes_back_counts_once():
    book = UsageBook()
    for made in (say("a", 5), say("a", 1, epoch="second"), say("a", 6)):
        book.observe(made)
    assert book.totals()["gold"].requests == 7


def test_a_replica_that_counted_as_gone_and_comes_back_counts_once():
    book = UsageBook()
    book.observe(say("a", 5))
    book.observe(say("b", 1))
    book.leave("a")
    assert book.totals()["gold"].requests == 6
    book.observe(say("a", 7))
    book.leave("never seen")
    assert book.totals()["gold"].requests == 8


def test_the_oldest_of_many_engines_still_count(monkeypatch):
    monkeypatch.setattr("deploy.usage.REMEMBERED_ENGINES", 3)
    book = UsageBook()
    for number in range(10):
        book.observe(say("a", 1, epoch=str(number)))
    book.observe(say("a", 2, epoch="8"))
    assert book.totals()["gold"].requests == 11


def test_totals_do_not_depend_on_who_reported_last():
    """A counter that falls by a rounding error looks like one that began anew."""
    book = UsageBook()
    for replica, requests in (("a", 1), ("b", 10**16), ("c", 1)):
        book.observe(say(replica, requests))
    before = book.totals()
    book.observe(say("b", 10**16))
    assert book.totals() == before


def test_engines_that_are_gone_are_summed_once(monkeypatch):
    sums = []
    monkeypatch.setattr("deploy.usage._sum", lambda one, other, add=_sum: sums.append(1) or add(one, other))
    book = UsageBook()
    for number in range(100):
        book.observe(say(f"replica {number}", 1))
        book.leave(f"replica {number - 1}")
    sums.clear()
    assert book.totals()["gold"].requests == 100
    assert len(sums) <= 2
