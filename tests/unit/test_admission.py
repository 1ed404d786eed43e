"""Who is let in, when and where; and each known way in which routers of this kind fail."""

import random

import pytest

from deploy.admission import Admission
from deploy.messages import Demand, Placement, Refusal
from deploy.settings import CoordinatorSettings
from deploy.tiers import Tier
from tests.unit.reports import compression, report

# In all of these a block has 32 tokens, and compression is off unless it is named.
LONG = 1280  # tokens: 40 blocks
SHORT = 64  # tokens: 2 blocks


def admission(**settings):
    values = {
        "queue_length": 8, "queue_deadline_seconds": 60, "lease_seconds": 30, "stale_report_seconds": 2,
        "short_request_tokens": 256, **settings,
    }  # fmt: skip
    return Admission(CoordinatorSettings(**values), random.Random(0))


def long_request(name, priority=0):
    return Demand(name, 100, LONG, priority=priority)


def short_request(name):
    return Demand(name, 32, SHORT)


def placed_on(decision):
    assert isinstance(decision, Placement), decision
    return decision.replica


def replica_state(core, replica="a", now=0.0):
    (found,) = [r for r in core.snapshot(now).replicas if r.replica == replica]
    return found


# -- the known failures --------------------------------------------------------------------------------------


def test_a_burst_between_two_reports_is_not_admitted_beyond_the_free_blocks():
    core = admission(queue_length=100)
    core.observe(report(total=100), 0)
    core.observe(report("b", total=100), 0)
    decisions = [core.submit(long_request(f"r{i}"), 0) for i in range(20)]
    assert sorted(placed_on(d) for d in decisions if d is not None) == ["a", "a", "b", "b"]


def test_the_output_is_reserved_and_not_only_the_prompt():
    core = admission()
    core.observe(report(total=100), 0)
    core.submit(Demand("r", 32, LONG), 0)
    assert replica_state(core).reserved_blocks == 40


def test_with_compression_nothing_is_booked_above_the_bound():
    core = admission()
    core.observe(report(total=100, compression=compression()), 0)
    core.submit(Demand("r", 100, 8000), 0)
    assert replica_state(core).reserved_blocks < 20


def test_a_stale_replica_that_looks_idle_gets_nothing_until_it_reports_again():
    core = admission()
    core.observe(report("idle but silent", total=1000), 0)
    core.observe(report("busy", total=100), 3)
    assert placed_on(core.submit(long_request("r1"), 3)) == "busy"
    core.observe(report("idle but silent", sequence=2, total=1000), 3.1)
    assert placed_on(core.submit(long_request("r2"), 3.1)) == "idle but silent"


def test_stale_is_not_full_so_nothing_is_refused_while_all_replicas_are_silent():
    core = admission()
    core.observe(report(), 0)
    assert core.submit(long_request("r"), 10) is None
    (decision,) = core.observe(report(sequence=2), 11)
    assert placed_on(decision) == "a"


@pytest.mark.parametrize("end", ["released", "told as finished", "never told"])
def test_after_a_mass_abort_the_replica_is_chosen_again(end):
    core = admission()
    core.observe(report(total=100), 0)
    names = ("r1", "r2")
    for name in names:
        core.submit(long_request(name), 0)
    core.observe(report(sequence=2, total=100, held=dict.fromkeys(names, 40)), 1)
    assert core.submit(long_request("next"), 1) is None
    if end == "released":
        for name in names:
            core.release(name, 2)
    decisions = core.observe(report(sequence=3, total=100, finished=names if "finished" in end else ()), 2)
    if end == "never told":
        assert decisions == []
        core.observe(report(sequence=4, total=100), 32)
        decisions = core.tick(32)
    assert placed_on(decisions[0]) == "a"


def test_what_the_engine_reported_is_never_overwritten_by_what_was_placed_since():
    core = admission()
    core.observe(report(free=70, total=100), 0)
    core.submit(long_request("r"), 0)
    assert replica_state(core).engine.free_blocks == 70
    assert replica_state(core).reserved_blocks == 40


def test_one_full_replica_is_not_hidden_by_the_average():
    core = admission()
    core.observe(report("full", free=1), 0)
    core.observe(report("empty"), 0)
    assert {placed_on(core.submit(long_request(f"r{i}"), 0)) for i in range(2)} == {"empty"}
    # 21 blocks are free over both, but nowhere 40: the third waits instead of being spread over the average.
    assert core.submit(long_request("third"), 0) is None


def test_short_requests_do_not_wait_behind_long_ones():
    core = admission()
    core.observe(report(free=10), 0)
    assert core.submit(long_request("long"), 0) is None
    assert placed_on(core.submit(short_request("short"), 0)) == "a"


def test_refusals_carry_a_status_a_sentence_and_when_to_come_back():
    core = admission(queue_length=1)
    core.observe(report(free=0), 0)
    core.submit(long_request("first"), 0)
    refusal = core.submit(long_request("second"), 0)
    assert isinstance(refusal, Refusal)
    assert (refusal.status, refusal.reason) == (429, "queue_full")
    assert refusal.retry_after_seconds is not None
    assert "queue_length" in refusal.message


# -- the queue's order ---------------------------------------------------------------------------------------


def free_forty(core, sequence, now):
    return [d.reservation for d in core.observe(report(sequence=sequence, free=40), now)]


def test_the_queue_is_served_in_order_of_arrival():
    core = admission()
    core.observe(report(free=0), 0)
    for i, name in enumerate(("first", "second")):
        core.submit(long_request(name), i)
    assert free_forty(core, 2, 2) == ["first"]


def test_a_lower_priority_number_is_served_earlier():
    core = admission()
    core.observe(report(free=0), 0)
    core.submit(long_request("batch", priority=1), 0)
    core.submit(long_request("urgent"), 1)
    assert free_forty(core, 2, 2) == ["urgent"]


def test_waiting_makes_up_for_priority():
    core = admission(aging_seconds=10)
    core.observe(report(free=0), 0)
    core.submit(long_request("batch", priority=1), 0)
    core.submit(long_request("urgent"), 11)
    core.tick(11)
    assert free_forty(core, 2, 12) == ["batch"]


def test_a_large_request_is_not_starved_by_smaller_long_ones():
    core = admission()
    core.observe(report(free=20), 0)
    core.submit(long_request("needs forty"), 0)
    assert core.submit(Demand("needs ten", 100, 320), 0) is None
    assert free_forty(core, 2, 1) == ["needs forty"]


def test_a_request_that_only_fits_the_large_replica_does_not_block_those_that_fit_the_small_one():
    core = admission()
    core.observe(report("large", total=200, free=0), 0)
    core.observe(report("small", total=50), 0)
    assert core.submit(Demand("only large", 100, 32 * 100), 0) is None
    assert placed_on(core.submit(long_request("fits small"), 0)) == "small"


def test_short_ones_leave_one_replica_to_a_long_one_that_has_waited_half_its_deadline():
    core = admission(queue_length=50)

    def both_report(sequence, now):
        core.observe(report("a", sequence, free=30), now)
        core.observe(report("b", sequence, free=20), now)

    both_report(1, 0)
    core.submit(long_request("long"), 0)
    assert {placed_on(core.submit(short_request(f"early{i}"), 1)) for i in range(8)} == {"a", "b"}
    both_report(2, 31)
    assert {placed_on(core.submit(short_request(f"late{i}"), 31)) for i in range(2)} == {"b"}


def test_what_becomes_free_goes_to_the_short_ones_first():
    core = admission()
    core.observe(report(free=0), 0)
    core.submit(long_request("long, and earlier"), 0)
    core.submit(short_request("short"), 1)
    decisions = core.observe(report(sequence=2, free=41), 2)
    assert [decision.reservation for decision in decisions] == ["short"]


def test_the_replica_left_to_a_long_one_stays_the_same_while_others_become_free():
    core = admission(queue_length=50)
    core.observe(report("a", free=30), 0)
    core.observe(report("b", free=20), 0)
    core.submit(long_request("long"), 0)
    core.observe(report("b", 2, free=20), 29.5)
    core.observe(report("a", 2, free=30), 31)  # "a" is closest, and set aside
    core.observe(report("b", 3, free=39), 31)  # "b" is closer now, but has just become free
    assert {placed_on(core.submit(short_request(f"s{i}"), 31)) for i in range(5)} == {"b"}


def test_the_only_replica_is_never_closed_to_short_ones():
    core = admission()
    core.observe(report(free=30), 0)
    core.submit(long_request("long"), 0)
    core.observe(report(sequence=2, free=30), 40)
    assert placed_on(core.submit(short_request("short"), 40)) == "a"


def test_a_cancelled_request_leaves_the_queue_and_lets_the_next_one_pass():
    core = admission()
    core.observe(report(free=20), 0)
    core.submit(long_request("cancelled"), 0)
    core.submit(Demand("behind it", 100, 320), 0)
    (decision,) = core.release("cancelled", 1)
    assert decision.reservation == "behind it"
    assert core.release("cancelled", 1) == []


# -- replicas that fail, stop and start ----------------------------------------------------------------------


def test_a_silent_replica_is_to_be_probed_and_the_probes_report_brings_it_back():
    core = admission()
    core.observe(report("silent", total=1000), 0)
    core.observe(report("other", total=100), 3)
    core.set_listed(frozenset({"silent", "other"}), 3)
    assert core.stale(3) == ["silent"]
    core.observe(report("silent", sequence=2, total=1000), 3.1)
    assert core.stale(3.1) == []
    assert placed_on(core.submit(long_request("r"), 3.1)) == "silent"


def test_scale_down_takes_nothing_from_a_replica_that_drains_and_gives_it_nothing():
    core = admission()
    core.observe(report("stays", total=100), 0)
    core.observe(report("drains", total=200), 0)
    core.set_listed(frozenset({"stays", "drains"}), 0)
    assert placed_on(core.submit(long_request("running"), 0)) == "drains"
    core.set_listed(frozenset({"stays"}), 1)
    core.observe(report("drains", sequence=2, total=200, held={"running": 5}), 1)
    assert replica_state(core, "drains", 1).draining
    assert replica_state(core, "drains", 1).reservations == 1
    assert placed_on(core.submit(long_request("new"), 1)) == "stays"
    assert core.load(1).replicas == 1
    # Silent after that, it has stopped: nobody probes it, and it leaves without waiting to count as dead.
    core.observe(report("stays", sequence=2, total=100), 9)
    assert core.stale(9) == []
    assert core.gone(9, 120) == ["drains"]


def test_a_replica_that_serve_does_not_list_yet_gets_nothing_and_is_not_draining():
    core = admission()
    core.set_listed(frozenset({"a"}), 0)
    core.observe(report("a", total=50), 0)
    core.observe(report("starts", total=500), 0)
    assert not replica_state(core, "starts").draining
    assert placed_on(core.submit(long_request("r"), 0)) == "a"
    assert core.submit(long_request("waits"), 0) is None
    (decision,) = core.set_listed(frozenset({"a", "starts"}), 1)
    assert placed_on(decision) == "starts"


def test_the_load_counts_what_is_held_promised_and_waited_for():
    core = admission(watermark_blocks=4)
    core.observe(report("a", total=100), 0)
    core.observe(report("b", total=50), 0)
    core.submit(long_request("booked"), 0)
    core.submit(long_request("booked too"), 0)
    core.observe(report("a", 2, total=100, held={"booked": 10}), 0)
    core.submit(long_request("fits nowhere now"), 0)
    core.submit(long_request("nor this"), 0)
    load = core.load(0)
    assert (load.replicas, load.capacity_blocks, load.queued_blocks) == (2, 142, 40)
    assert load.committed_blocks == 3 * 40


# -- replicas of all kinds -----------------------------------------------------------------------------------


def test_long_and_short_requests_are_placed_by_their_own_policies():
    core = admission()
    core.observe(report("roomy", total=200, running=9), 0)
    core.observe(report("idle", total=100, running=0), 0)
    assert core.submit(long_request("long"), 0) == Placement("long", "roomy", "most_headroom", "long")
    assert core.submit(short_request("short"), 0) == Placement("short", "idle", "least_loaded_of_two", "short")


def test_the_watermark_stays_free():
    core = admission(watermark_blocks=4)
    core.observe(report(free=43), 0)
    assert core.submit(long_request("r"), 0) is None


def test_a_removed_replica_gets_nothing_and_its_requests_are_forgotten():
    core = admission()
    core.observe(report(), 0)
    core.submit(long_request("r"), 0)
    core.remove_replica("a", 1)
    assert core.snapshot(1).replicas == ()
    assert core.submit(long_request("next"), 1) is None


def test_silent_replicas_are_named():
    core = admission()
    core.observe(report("a"), 0)
    core.observe(report("b"), 100)
    assert core.silent(119, seconds=120) == []
    assert core.silent(121, seconds=120) == ["a"]


def test_a_restarted_engine_starts_with_nothing_reserved():
    core = admission()
    core.observe(report(), 0)
    for i in range(2):
        core.submit(long_request(f"r{i}"), 0)
    core.observe(report(epoch="second"), 1)
    assert replica_state(core, now=1).reserved_blocks == 0
    assert placed_on(core.submit(long_request("next"), 1)) == "a"


def test_the_snapshot_counts_what_was_decided():
    core = admission()
    core.observe(report(total=100), 0)
    core.submit(long_request("a long one"), 0)
    core.submit(short_request("a short one"), 0)
    core.submit(Demand("too long", 100, 9000), 0)
    core.submit(Demand("waits", 100, 32 * 90), 0)
    seen = core.snapshot(1)
    assert seen.admissions == 2
    assert seen.placements == {"a": {"most_headroom": 1, "least_loaded_of_two": 1}}
    assert seen.rejections["over_max_model_len"] == 1
    assert seen.queue_length == {"short": 0, "long": 1}
    assert seen.queued_blocks == 90
    assert sum(seen.tiers["default"].counts.waits["long"].counts) == 1


def test_a_key_has_so_many_requests_at_once_in_the_whole_fleet_running_and_waiting():
    core = Admission(CoordinatorSettings(), random.Random(0), {"gold": Tier(concurrent_requests=3)})
    core.observe(report(total=90), 0)
    core.observe(report("b", total=45), 0)

    def submit(name, tenant="k1"):
        return core.submit(Demand(name, 100, LONG, tier="gold", tenant=tenant), 0)

    assert isinstance(submit("r1"), Placement)
    assert isinstance(submit("r2"), Placement)
    assert isinstance(submit("another's", "k2"), Placement)
    assert submit("r3") is None, "the third waits, for the pools are full"
    refused = submit("r4")
    assert isinstance(refused, Refusal)
    assert (refused.status, refused.reason) == (429, "concurrent_requests")
    assert core.snapshot(0).tiers["gold"].counts.rejections["concurrent_requests"] == 1
    # A reservation that ends by release counts no longer, though nobody has told yet what it took.
    core.release("r1", 0)
    assert not isinstance(submit("r5"), Refusal)
