"""What a body may hold, at every limit and one over, and what vLLM would stumble over. The sizes are the door's."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicas.limits import RequestLimits, check_body

SMALL = RequestLimits(
    body_bytes=400, header_bytes=512, messages=3, prompts=2, choices=2, output_tokens=10, stop_strings=2,
    stop_string_characters=4, logprobs=5, body_seconds=0.2, request_seconds=0.2,
)  # fmt: skip
MESSAGE = {"role": "user", "content": "x"}


@pytest.mark.parametrize(
    ("at", "over", "name"),
    [
        ({"messages": [MESSAGE] * 3}, {"messages": [MESSAGE] * 4}, "messages"),
        ({"prompt": ["a"] * 2}, {"prompt": ["a"] * 3}, "prompts"),
        ({"prompt": [1] * 50}, {"prompt": [[1]] * 3}, "prompts"),
        ({"n": 2}, {"n": 3}, "choices"),
        ({"n": 2}, {"n": 10**4000}, "choices"),
        ({"best_of": 2}, {"best_of": 3}, "choices"),
        ({"max_tokens": 10}, {"max_tokens": 11}, "output_tokens"),
        ({"max_completion_tokens": 10}, {"max_completion_tokens": 11}, "output_tokens"),
        ({"max_output_tokens": 10}, {"max_output_tokens": 11}, "output_tokens"),
        ({"stop": ["a", "b"]}, {"stop": ["a", "b", "c"]}, "stop_strings"),
        ({"stop": "abcd"}, {"stop": "abcde"}, "stop_string_characters"),
        ({"stop": ["abcd"]}, {"stop": ["abcde"]}, "stop_string_characters"),
        ({"logprobs": 5}, {"logprobs": 6}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 5}, {"logprobs": True, "top_logprobs": 6}, "logprobs"),
        ({"prompt_logprobs": 5}, {"prompt_logprobs": 6}, "logprobs"),
    ],
)
def test_a_body_is_taken_at_a_limit_and_refused_one_over(at, over, name):
    assert check_body(at, SMALL) is None
    refused = check_body(over, SMALL)
    assert refused is not None
    assert f"limits.{name} is" in refused.message
    assert len(refused.message) < 200


@pytest.mark.parametrize("content", [[], [{"type": "refusal", "refusal": "no"}]])
def test_a_former_answer_without_text_is_refused_before_vllm_stumbles_over_it(content):
    answer = {"type": "message", "role": "assistant", "id": "", "status": "completed", "content": content}
    refused = check_body({"input": ["hi", answer]}, SMALL)
    assert (refused.status, refused.param) == (400, "input")
    assert "input[1] is an answer of the assistant without text" in refused.message
    text = {"type": "output_text", "text": "yes"}
    for item in ({**answer, "content": [text]}, {**answer, "content": "yes"}, {**answer, "role": "user"}):
        assert check_body({"input": [item]}, SMALL) is None


def test_structured_outputs_that_are_no_object_are_refused_before_vllm_stumbles_over_them():
    assert check_body({"structured_outputs": {"regex": "a"}}, SMALL) is None
    assert check_body({"structured_outputs": None}, SMALL) is None
    refused = check_body({"structured_outputs": 2}, SMALL)
    assert refused is not None
    assert "structured_outputs is not an object" in refused.message


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=10,
)
FIELDS = st.sampled_from(["n", "stop", "prompt", "messages", "logprobs", "max_tokens", "input"])


@given(st.dictionaries(FIELDS, VALUES))
def test_whatever_a_body_holds_the_limits_answer_or_let_it_pass(body):
    refused = check_body(body, SMALL)
    assert refused is None or json.dumps(refused.body())
