"""Where the beginnings of prompts were computed, and what placement makes of it."""

import random

from deploy.admission import Admission
from deploy.affinity import REMEMBERED_PREFIXES, SHORTEST_PREFIX, PrefixIndex, prefix_hashes
from deploy.messages import Demand
from deploy.settings import CoordinatorSettings
from tests.unit.reports import report

SYSTEM = "You are careful. " * 200  # 3,400 characters: three prefixes


def test_prompts_that_begin_alike_share_the_hashes_of_their_beginning():
    one, two = prefix_hashes(SYSTEM + "a" * 3000), prefix_hashes(SYSTEM + "b" * 3000)
    assert one[:2] == two[:2]
    assert one[2] != two[2]


def test_short_prompts_have_no_prefix():
    assert prefix_hashes("x" * (SHORTEST_PREFIX - 1)) == ()


def test_the_index_tells_how_much_each_replica_shares():
    index = PrefixIndex()
    index.note((1, 2, 3), "a")
    index.note((1, 9), "b")
    assert index.shared((1, 2, 3, 4)) == {"a": 3, "b": 1}
    assert index.shared((7,)) == {}


def test_the_index_is_bounded_and_forgets_the_oldest():
    index = PrefixIndex()
    for number in range(REMEMBERED_PREFIXES + 10):
        index.note((number,), "a")
    assert index.shared((0,)) == {}
    assert index.shared((REMEMBERED_PREFIXES + 9,)) == {"a": 1}


def test_requests_that_begin_alike_meet_on_one_replica_until_its_headroom_says_otherwise():
    core = Admission(CoordinatorSettings(short_request_tokens=0), random.Random(0))
    for name in "abcd":
        core.observe(report(name, total=1000), 0)
    prefix = prefix_hashes(SYSTEM)
    placed = [core.submit(Demand(f"r{n}", 100, 640, prefix=prefix), 0).replica for n in range(12)]
    assert len(set(placed[:5])) == 1  # five times 20 blocks of 1,000: still about as much room as elsewhere
    assert len(set(placed)) > 1  # then another has clearly more


def test_a_replica_on_the_node_of_the_request_is_taken_among_equals():
    from dataclasses import replace

    core = Admission(CoordinatorSettings(), random.Random(0))
    for name, node in (("a", "n1"), ("b", "n2"), ("c", "")):
        core.observe(replace(report(name), node=node), 0)
    assert core.submit(Demand("r", 100, 3000, node="n2"), 0).replica == "b"
