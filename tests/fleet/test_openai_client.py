"""What an application developer does with the endpoint, through the `openai` package."""

import openai

from tests.fleet.conftest import MAX_MODEL_LEN, MODEL, RunningFleet

CHAT = [{"role": "user", "content": "Count with me."}]
# The tiny model may end early; these tests count tokens.
IGNORE_EOS = {"ignore_eos": True}


def test_models_lists_the_served_name(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]


def test_chat_answers_and_counts_tokens(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=CHAT, max_tokens=8, extra_body=IGNORE_EOS)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 8
    assert answer.usage.prompt_tokens > 0


def test_completion_answers(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="one two", max_tokens=5, extra_body=IGNORE_EOS)
    assert answer.usage.completion_tokens == 5


def test_an_answer_for_which_the_prompt_leaves_less_room_than_asked_for_ends_with_the_context(
    client: openai.OpenAI,
) -> None:
    long = [5] * (MAX_MODEL_LEN - 4)
    answer = client.completions.create(model=MODEL, prompt=long, max_tokens=MAX_MODEL_LEN, extra_body=IGNORE_EOS)
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (4, "length")
    truncated = {"truncate_prompt_tokens": -1, **IGNORE_EOS}
    answer = client.completions.create(model=MODEL, prompt=long * 2, max_tokens=9, extra_body=truncated)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (MAX_MODEL_LEN - 1, 1)


def test_greedy_answers_repeat_whatever_replica_serves(client: openai.OpenAI) -> None:
    texts = {
        client.completions.create(model=MODEL, prompt="a b c", max_tokens=24, temperature=0).choices[0].text
        for _ in range(6)
    }
    assert len(texts) == 1


def test_chat_streams_with_usage(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model=MODEL,
        messages=CHAT,
        max_tokens=12,
        stream=True,
        stream_options={"include_usage": True},
        extra_body=IGNORE_EOS,
    )
    pieces = list(stream)
    assert pieces[-1].usage.completion_tokens == 12
    assert [choice.finish_reason for piece in pieces for choice in piece.choices][-1] == "length"


def test_streamed_text_equals_the_whole_answer(client: openai.OpenAI) -> None:
    whole = client.completions.create(model=MODEL, prompt="x y z", max_tokens=40, temperature=0)
    stream = client.completions.create(model=MODEL, prompt="x y z", max_tokens=40, temperature=0, stream=True)
    assert "".join(piece.choices[0].text for piece in stream) == whole.choices[0].text


def test_stop_string_ends_the_answer(client: openai.OpenAI) -> None:
    free = client.completions.create(model=MODEL, prompt="x y z", max_tokens=40, temperature=0)
    text = free.choices[0].text
    stop = text[len(text) // 2 : len(text) // 2 + 2]
    stopped = client.completions.create(model=MODEL, prompt="x y z", max_tokens=40, temperature=0, stop=[stop])
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.choices[0].text == text[: text.index(stop)]


def test_n_gives_so_many_choices_and_their_blocks_come_back(fleet: RunningFleet, client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=CHAT, max_tokens=6, n=3, temperature=1)
    assert sorted(choice.index for choice in answer.choices) == [0, 1, 2]
    fleet.await_whole_pool(seconds=2)


def test_logprobs_come_with_alternatives(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=CHAT, max_tokens=4, logprobs=True, top_logprobs=3, extra_body=IGNORE_EOS
    )
    tokens = answer.choices[0].logprobs.content
    assert len(tokens) == 4
    assert all(len(token.top_logprobs) == 3 for token in tokens)


def test_the_clients_own_request_id_comes_back(client: openai.OpenAI) -> None:
    raw = client.completions.with_raw_response.create(
        model=MODEL, prompt="hi", max_tokens=2, extra_headers={"X-Request-Id": "mine-1"}
    )
    assert raw.headers["x-request-id"] == "mine-1"


def test_a_long_answer_is_compacted(fleet: RunningFleet, client: openai.OpenAI) -> None:
    before = fleet.samples()
    answer = client.completions.create(model=MODEL, prompt="once", max_tokens=900, extra_body=IGNORE_EOS)
    assert answer.usage.completion_tokens == 900
    after = fleet.samples()
    for name in ("triattention_compactions_total", "triattention_freed_blocks_total"):
        assert after[name] > before[name]
    assert after["triattention_stranded_slots"] == 0
