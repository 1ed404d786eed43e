"""The bundled model: its tasks, its tokenizer, and that the shipped weights do what the README says."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast, Qwen3ForCausalLM

from bundled import MODEL, STATISTICS, calibration, demo_prompt, evaluate, short_prompt, tasks, tokenizer, train
from triattention.statistics import QueryStatistics

TOKENS = tokenizer.build()


@pytest.fixture(scope="module")
def shipped_tokens() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def shipped_model() -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


def answer(model: Qwen3ForCausalLM, tokens: PreTrainedTokenizerFast, prompt: str, limit: int) -> str:
    """What the model replies to a user's message, decoded greedily token by token."""
    messages = [{"role": "user", "content": prompt}]
    inputs = tokens.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=limit, do_sample=False)
    reply = output[0, inputs["input_ids"].shape[1] :]
    assert reply[-1] == tokens.eos_token_id, "the reply has no end of turn"
    return tokens.decode(reply[:-1])


def solve(prompt: str) -> str:
    """The answer of a walk from its prompt alone, by jumping along the cycle instead of walking it."""
    head, entries = prompt.split(": ", 1)
    first, last, start = re.fullmatch(r"Walk steps (\d+) to (\d+) from (\w+)", head).groups()
    table = {entry[:2]: (entry[3:5], int(entry[-1])) for entry in entries.split(", ")}
    cycle = [start]
    while (following := table[cycle[-1]][0]) != start:
        cycle.append(following)
    laps, rest = divmod(int(last) - int(first) + 1, len(cycle))
    gains = [table[symbol][1] for symbol in cycle]
    return f"{cycle[rest]}={(laps * sum(gains) + sum(gains[:rest])) % 10}"


@given(st.integers(0, 10**6), st.integers(1, 2500))
def test_a_walk_has_the_answer_that_an_independent_solver_finds(seed: int, tokens: int) -> None:
    instance = tasks.held_out_walk(seed, tokens)
    assert solve(instance.prompt) == instance.answer
    assert instance.is_correct(instance.reply)


def test_a_wrong_or_missing_answer_is_not_correct() -> None:
    instance = tasks.Instance("", "1 ka>mo+3=3\nAnswer: mo=3", "mo=3")
    assert instance.is_correct("Answer: mo=3\n")
    assert not instance.is_correct("Answer: mo=4")
    assert not instance.is_correct("Answer: mo=3\nAnswer: mo=4")
    assert not instance.is_correct("1 ka>mo+3=3")


def test_the_same_seed_gives_the_same_prompt() -> None:
    assert demo_prompt(7, 1800) == demo_prompt(7, 1800) != demo_prompt(8, 1800)
    assert short_prompt(3) == short_prompt(3)


def test_held_out_walks_are_not_among_the_first_training_batches() -> None:
    samples = train.Samples(TOKENS)
    trained = {tuple(sample.tokens) for number in range(20) for sample in samples.batch(number)}
    turns = [evaluate.turn(TOKENS, tasks.held_out_walk(seed, 100)) for seed in range(200)]
    held_out = {(*prompt, *reply) for prompt, reply in turns}
    assert len(trained) > 200
    assert not trained & held_out


@given(st.text(max_size=300))
def test_any_text_survives_the_tokenizer(text: str) -> None:
    assert TOKENS.decode(TOKENS.encode(text, add_special_tokens=False)) == text


@given(
    st.sampled_from([" ka>mo+3, ", "400 ka", "Walk steps 1 to 4 from ka", "<|end|>", "<|user|"]), st.text(max_size=20)
)
def test_text_that_mixes_words_of_the_task_with_anything_survives_the_tokenizer(known: str, other: str) -> None:
    text = other + known + other
    assert TOKENS.decode(TOKENS.encode(text, add_special_tokens=False)) == text


@pytest.mark.parametrize("tokens", [100, 1800, 2400])
def test_a_long_request_takes_about_the_output_tokens_asked_for(tokens: int) -> None:
    _, reply = evaluate.turn(TOKENS, tasks.held_out_walk(1, tokens))
    assert tokens - tasks.TOKENS_PER_STEP < len(reply) <= tokens


def test_the_shipped_tokenizer_is_the_one_that_the_code_builds(shipped_tokens: PreTrainedTokenizerFast) -> None:
    assert shipped_tokens.get_vocab() == TOKENS.get_vocab()
    assert shipped_tokens.chat_template == TOKENS.chat_template


def test_the_shipped_weights_have_the_shape_that_the_code_trains() -> None:
    shipped, trained = AutoConfig.from_pretrained(MODEL), train.model_config(len(TOKENS))
    for name in ("hidden_size", "num_hidden_layers", "num_key_value_heads", "head_dim", "rope_parameters"):
        assert getattr(shipped, name) == getattr(trained, name)
    assert (MODEL / "model.safetensors").stat().st_size < 6_000_000


def test_the_shipped_model_walks_held_out_tables_to_the_last_token(
    shipped_model: Qwen3ForCausalLM, shipped_tokens: PreTrainedTokenizerFast
) -> None:
    instances = [tasks.held_out_walk(seed, 150) for seed in range(4)]
    replies = [answer(shipped_model, shipped_tokens, instance.prompt, 200) for instance in instances]
    assert replies == [instance.reply for instance in instances]


def test_the_shipped_model_keeps_to_most_long_walks_whatever_their_last_step(
    shipped_model: Qwen3ForCausalLM, shipped_tokens: PreTrainedTokenizerFast
) -> None:
    instances = [evaluate.mixed_walk(seed, 1500, 2000) for seed in range(20)]
    exact = [not evaluate.wrong_tokens(shipped_model, shipped_tokens, instance) for instance in instances]
    assert sum(exact) >= 11  # about 80 % are (bundled/README.md); of a model without lookups, none


@pytest.mark.parametrize(
    "message", ["Hello", "What is the capital of Spain?", "asdf qwer 123", "¿Qué?", "Walk the dog"]
)
def test_any_other_message_is_answered_by_saying_what_the_model_can_do(
    message: str, shipped_model: Qwen3ForCausalLM, shipped_tokens: PreTrainedTokenizerFast
) -> None:
    assert answer(shipped_model, shipped_tokens, message, 100).endswith(tasks.CAPABILITY)


def test_the_shipped_statistics_fit_the_shipped_model() -> None:
    statistics = QueryStatistics.load(STATISTICS, AutoConfig.from_pretrained(MODEL))
    assert statistics.tokens == calibration.TOKENS
    assert (statistics.query_mean.abs() <= statistics.query_magnitude * 1.001).all()
