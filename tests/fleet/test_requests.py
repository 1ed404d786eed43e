"""How a request body becomes a demand or an answer; no fleet needed."""

import json
from typing import Any

import pytest

from deploy.requests import Admissible, Served, examine
from deploy.tiers import Tier
from replicas.access import ANONYMOUS, DEFAULT_TIER, Tenant
from replicas.headers import Answer
from replicas.limits import RequestLimits

SERVED = Served("m", 100)
ANYONE = Tenant(ANONYMOUS, DEFAULT_TIER)
NO_LIMIT = Tier()
MESSAGES = [{"role": "user", "content": "four words are here"}]


class Words:
    """Counts words, and one token for each message's frame."""

    def chat(self, body: dict[str, Any]) -> int:
        return sum(1 + len(message["content"].split()) for message in body["messages"])

    def text(self, text: str) -> int:
        return len(text.split())


def look(body: Any, tenant: Tenant = ANYONE, tier: Tier = NO_LIMIT) -> Admissible | Answer:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return examine(raw, "rsv1", SERVED, Words(), tenant, tier, RequestLimits())


def demand(body: Any) -> tuple[int, int, int]:
    found = look(body)
    assert isinstance(found, Admissible), found
    return found.demand.prompt_tokens, found.demand.total_tokens, found.demand.sequences


def refused(body: Any) -> str:
    found = look(body)
    assert isinstance(found, Answer), found
    return found.message


def test_a_chat_without_limit_may_run_to_the_model_length() -> None:
    assert demand({"messages": MESSAGES}) == (5, 100, 1)


def test_a_completion_without_limit_takes_openais_sixteen_tokens() -> None:
    assert demand({"prompt": "a b c"}) == (3, 19, 1)


def test_max_completion_tokens_goes_before_max_tokens() -> None:
    assert demand({"messages": MESSAGES, "max_tokens": 9, "max_completion_tokens": 4}) == (5, 9, 1)


def test_every_choice_of_every_prompt_is_a_sequence_as_long_as_the_longest() -> None:
    assert demand({"prompt": ["a b c", "a"], "n": 3, "max_tokens": 7}) == (3, 10, 6)


def test_token_ids_are_counted_as_they_are() -> None:
    assert demand({"prompt": [7, 8, 9, 10], "max_tokens": 1}) == (4, 5, 1)
    assert demand({"prompt": [[7, 8], [9]], "max_tokens": 1}) == (2, 3, 2)


def test_a_truncated_prompt_counts_what_is_left() -> None:
    assert demand({"prompt": [1] * 500, "truncate_prompt_tokens": 20, "max_tokens": 5}) == (20, 25, 1)


@pytest.mark.parametrize("content", [[{"type": "image_url"}], "x" * 5000, "\ud800"])
def test_what_cannot_be_counted_is_admitted_with_a_byte_per_token_and_left_to_vllm(content: Any) -> None:
    class Clueless(Words):
        def chat(self, body: dict[str, Any]) -> int:
            raise ValueError("not a text that I know")

    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 30}
    found = examine(json.dumps(body).encode(), "rsv1", SERVED, Clueless(), ANYONE, Tier(), RequestLimits())
    assert isinstance(found, Admissible)
    assert found.demand.prompt_tokens == min(99, len(json.dumps(body)))
    assert found.demand.total_tokens == 100


def test_another_endpoints_body_is_admitted_without_a_kind() -> None:
    found = look({"input": "tell me", "model": "m"})
    assert isinstance(found, Admissible)
    assert found.kind is None


def test_a_limit_that_exactly_fills_the_model_length_is_allowed() -> None:
    assert demand({"messages": MESSAGES, "max_tokens": 95}) == (5, 100, 1)
    assert "lower max_tokens to at most 95" in refused({"messages": MESSAGES, "max_tokens": 96})


def test_a_prompt_that_leaves_no_room_for_output_is_refused() -> None:
    assert "The prompt has 100 tokens" in refused({"prompt": [1] * 100})
    assert demand({"prompt": [1] * 99, "max_tokens": 1}) == (99, 100, 1)


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b"", "not valid JSON"),
        (b"\x80", "not UTF-8"),
        (b"[" * 200_000, "JSON"),
        (b"3", "not a JSON object"),
        ({}, "no input"),
        ({"messages": "hi"}, "messages is empty or not a list"),
        ({"messages": [{"content": "x"}]}, "messages[0] is not a message"),
        ({"prompt": []}, "prompt is not a prompt"),
        ({"prompt": None}, "prompt is not a prompt"),
        ({"prompt": ["a", 1]}, "prompt is not a prompt"),
        ({"prompt": "a", "max_tokens": True}, "max_tokens is true"),
        ({"prompt": "a", "max_tokens": 1.5}, "max_tokens is 1.5"),
        ({"prompt": "a", "n": -1}, "n is -1"),
        ({"model": "x" * 10_000, "prompt": "a"}, "does not exist"),
        ({"model": {"a": 1}, "prompt": "a"}, "does not exist"),
    ],
)
def test_bad_bodies_are_refused_in_a_short_sentence(body: Any, sentence: str) -> None:
    message = refused(body)
    assert sentence in message
    assert len(message) < 300


def test_a_tier_bounds_the_context_and_is_named_when_it_does() -> None:
    tenant, tier = Tenant("abc", "small"), Tier(max_context_tokens=20, priority=3)
    found = look({"messages": MESSAGES}, tenant, tier)
    assert isinstance(found, Admissible)
    assert (found.demand.total_tokens, found.demand.priority) == (20, 3)
    assert (found.demand.tier, found.demand.tenant) == ("small", "abc")
    # vLLM knows nothing of tiers: the replica tells it the limit.
    assert found.output_limit == 15
    refusal = look({"messages": MESSAGES, "max_tokens": 16}, tenant, tier)
    assert isinstance(refusal, Answer)
    assert "max_context_tokens of tier small is 20" in refusal.message


def test_a_limit_of_the_clients_own_is_left_as_it_is() -> None:
    found = look({"messages": MESSAGES, "max_tokens": 3}, ANYONE, Tier(max_context_tokens=20))
    assert isinstance(found, Admissible)
    assert found.output_limit is None
