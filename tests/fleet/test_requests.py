"""How a request body becomes a demand or an answer; no fleet needed."""

import json
from typing import Any

import pytest

from deploy.requests import Admissible, Served, examine
from deploy.tiers import Tier
from replicas.access import ANONYMOUS, DEFAULT_TIER, Tenant
from replicas.endpoints import CHAT, COMPLETION, MESSAGE, RESPONSE, Endpoint
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


def look(
    body: Any, tenant: Tenant = ANYONE, tier: Tier = NO_LIMIT, endpoint: Endpoint | None = None
) -> Admissible | Answer:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    if endpoint is None:
        endpoint = COMPLETION if isinstance(body, dict) and "prompt" in body else CHAT
    return examine(raw, endpoint, "rsv1", SERVED, Words(), tenant, tier, RequestLimits())


def demand(body: Any, endpoint: Endpoint | None = None) -> tuple[int, int, int]:
    found = look(body, endpoint=endpoint)
    assert isinstance(found, Admissible), found
    return found.demand.prompt_tokens, found.demand.total_tokens, found.demand.sequences


def refused(body: Any, endpoint: Endpoint | None = None) -> str:
    found = look(body, endpoint=endpoint)
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
    assert demand({"prompt": [1] * 500, "truncate_prompt_tokens": -1, "max_tokens": 5}) == (99, 100, 1)
    assert demand({"prompt": [1] * 50, "truncate_prompt_tokens": -1, "max_tokens": 5}) == (50, 55, 1)


class Clueless(Words):
    def chat(self, body: dict[str, Any]) -> int:
        raise ValueError("not a text that I know")


class Mute(Clueless):
    def text(self, text: str) -> int:
        raise ValueError("no text at all")


@pytest.mark.parametrize(("counter", "tokens"), [(Clueless(), 6), (Mute(), 95)])
def test_what_cannot_be_counted_is_booked_by_its_json_and_left_to_vllm(counter: Words, tokens: int) -> None:
    content = [{"type": "image_url"}]
    raw = json.dumps({"messages": [{"role": "user", "content": content}], "max_tokens": 3, "x": "y"}).encode()
    found = examine(raw, CHAT, "rsv1", SERVED, counter, ANYONE, Tier(), RequestLimits())
    assert isinstance(found, Admissible)
    assert found.demand.prompt_tokens == tokens
    longer = raw.replace(b'"y"', b'"' + b"y" * 5000 + b'"').replace(b": 3", b": 5000")
    found = examine(longer, CHAT, "rsv1", SERVED, counter, ANYONE, Tier(), RequestLimits())
    assert isinstance(found, Admissible)
    assert found.demand.total_tokens == 100


@pytest.mark.parametrize(
    ("endpoint", "body"),
    [
        (RESPONSE, {"instructions": "be kind", "input": "tell me all", "max_output_tokens": 30}),
        (MESSAGE, {"system": "be kind", "messages": ["tell me all"], "max_tokens": 30}),
    ],
)
def test_other_endpoints_are_booked_by_all_that_their_prompt_holds(endpoint: Endpoint, body: dict[str, Any]) -> None:
    prompt, total, sequences = demand(body, endpoint)
    assert 5 <= prompt <= 8
    assert (total, sequences) == (prompt + 30, 1)


@pytest.mark.parametrize(
    ("endpoint", "body", "total"),
    [
        (COMPLETION, {"prompt": "a", "max_tokens": 30, "max_completion_tokens": 1}, 31),
        (COMPLETION, {"prompt": "a", "max_tokens": 30, "max_output_tokens": 1, "input": ""}, 31),
        (COMPLETION, {"prompt": "a b c d", "max_tokens": 1, "messages": MESSAGES}, 5),
        (CHAT, {"messages": MESSAGES, "max_tokens": 1, "prompt": "a", "input": "a"}, 6),
    ],
)
def test_fields_of_other_endpoints_change_nothing(endpoint: Endpoint, body: dict[str, Any], total: int) -> None:
    assert demand(body, endpoint)[1] == total


def test_a_completion_may_only_score_its_prompt() -> None:
    assert demand({"prompt": "a b c", "max_tokens": 0, "echo": True}) == (3, 4, 1)
    assert "max_tokens is 0" in refused({"prompt": "a b c", "max_tokens": 0})


@pytest.mark.parametrize("endpoint", [RESPONSE, MESSAGE])
def test_a_tier_bounds_what_is_only_estimated_too(endpoint: Endpoint) -> None:
    tier, (limit,) = Tier(max_context_tokens=20), endpoint.output_limits
    for body in ({limit: 19}, {limit: 5000}, {limit: 5, "instructions": "a " * 15, "system": "a " * 15}):
        found = look({endpoint.prompt: ["tell me all"], **body}, ANYONE, tier, endpoint)
        assert isinstance(found, Answer)
        assert "max_context_tokens of tier default is 20" in found.message
        assert "about" in found.message
    found = look({endpoint.prompt: ["tell me all"]}, ANYONE, tier, endpoint)
    assert isinstance(found, Admissible)
    assert found.output_limit is not None
    assert 10 <= found.output_limit < 20


@pytest.mark.parametrize("asked", [95, 96, 100])
def test_an_output_limit_for_which_the_prompt_leaves_no_room_ends_at_the_model_length_as_vllms_does(asked: int) -> None:
    assert demand({"messages": MESSAGES, "max_tokens": asked}) == (5, 100, 1)
    found = look({"messages": MESSAGES, "max_tokens": asked})
    assert isinstance(found, Admissible)
    assert found.output_limit is None  # vLLM cuts it itself


def test_an_output_limit_above_the_model_length_is_refused() -> None:
    assert "lower max_tokens to at most 95" in refused({"messages": MESSAGES, "max_tokens": 101})


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
        ({}, "messages is missing"),
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
    found = look({"messages": MESSAGES, "max_tokens": 16}, tenant, tier)
    assert isinstance(found, Admissible)
    assert (found.demand.total_tokens, found.output_limit) == (20, 15)
    refusal = look({"messages": MESSAGES, "max_tokens": 21}, tenant, tier)
    assert isinstance(refusal, Answer)
    assert "max_context_tokens of tier small is 20" in refusal.message


def test_a_limit_of_the_clients_own_within_its_tiers_is_left_as_it_is() -> None:
    found = look({"messages": MESSAGES, "max_tokens": 3}, ANYONE, Tier(max_context_tokens=20))
    assert isinstance(found, Admissible)
    assert found.output_limit is None
