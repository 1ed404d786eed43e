"""The bundled model: its prompts, its tokenizer, and that the shipped weights do what the README says."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast, Qwen3ForCausalLM

from bundled import (
    LONGEST_DEMO,
    MODEL,
    SHORTEST_DEMO,
    STATISTICS,
    calibration,
    demo_prompt,
    network,
    short_prompt,
    tasks,
    tokenizer,
)
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


def wrong_tokens(model: Qwen3ForCausalLM, tokens: PreTrainedTokenizerFast, instance: tasks.Instance) -> int:
    """How many tokens of the right reply the model would not have said there; with 0, it says that reply."""
    turn = [{"role": "user", "content": instance.prompt}]
    prompt = tokens.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
    reply = [*tokens.encode(instance.reply, add_special_tokens=False), tokens.eos_token_id]
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *reply]])).logits[0]
    return int((logits[len(prompt) - 1 : -1].argmax(dim=-1) != torch.tensor(reply)).sum())


def test_the_same_seed_gives_the_same_prompt() -> None:
    assert demo_prompt(7, 1800) == demo_prompt(7, 1800) != demo_prompt(8, 1800)
    assert short_prompt(3) == short_prompt(3)


def trace_tokens(prompt: str) -> int:
    """Tokens of the right reply to a prompt of registers, the end of turn included, by running it line by line."""
    listed, rest = prompt.removeprefix("Run: ").split(" run ")
    runs, rest = rest.split(" add ")
    asked = rest.split(" ask ")[1].split(" start ")[0].split()
    instructions, names = listed.split()[:-1], runs.split()
    lines = ["c=0 b=0 a=0 ka"]
    for name in names:
        lines += [f"1 {instruction} +1 c=0 b=0 a=0 ka" for instruction in instructions]
        lines.append(f"1 1:mark ka=0 {name} ka&ka +0 c=0 b=0 a=0 ka")
    lines.append(" ".join(["report", *(f"1 {query} ka=0" for query in asked[:-1]), "4", asked[-1]]))
    return len(TOKENS.encode("".join(f" {line}\n" for line in lines), add_special_tokens=False)) + 1


@given(st.integers(0, 10**6), st.integers(SHORTEST_DEMO, LONGEST_DEMO))
def test_a_demo_prompt_takes_about_the_output_tokens_asked_for(seed: int, tokens: int) -> None:
    assert abs(trace_tokens(demo_prompt(seed, tokens)) - tokens) <= max(4, tokens // 20)


def test_a_short_prompt_takes_few_output_tokens() -> None:
    for seed in range(0, 100, 2):
        assert trace_tokens(short_prompt(seed)) < 70


@given(st.text(max_size=300))
def test_any_text_survives_the_tokenizer(text: str) -> None:
    assert TOKENS.decode(TOKENS.encode(text, add_special_tokens=False)) == text


@given(
    st.sampled_from([" ka>mo+3, ", "400 ka", "Walk steps 1 to 4 from ka", "<|end|>", "<|user|"]), st.text(max_size=20)
)
def test_text_that_mixes_words_of_the_task_with_anything_survives_the_tokenizer(known: str, other: str) -> None:
    text = other + known + other
    assert TOKENS.decode(TOKENS.encode(text, add_special_tokens=False)) == text


def test_every_word_of_a_task_is_one_token() -> None:
    for task in tasks.TASKS:
        instance = tasks.held_out(task, 1, 1_000, 1_600)
        assert len(TOKENS.encode(instance.prompt, add_special_tokens=False)) == len(instance.prompt.split())


def test_the_shipped_tokenizer_is_the_one_that_the_code_builds(shipped_tokens: PreTrainedTokenizerFast) -> None:
    assert shipped_tokens.get_vocab() == TOKENS.get_vocab()
    assert shipped_tokens.chat_template == TOKENS.chat_template


def test_the_shipped_weights_have_the_shape_that_the_code_trains() -> None:
    shipped, trained = AutoConfig.from_pretrained(MODEL), network.model_config(len(TOKENS))
    for name in ("hidden_size", "num_hidden_layers", "num_key_value_heads", "head_dim", "rope_parameters"):
        assert getattr(shipped, name) == getattr(trained, name)


def test_the_model_card_states_the_size_of_the_shipped_weights(shipped_model: Qwen3ForCausalLM) -> None:
    parameters = sum(weight.numel() for weight in shipped_model.parameters()) / 1e6
    megabytes = (MODEL / "model.safetensors").stat().st_size / 1e6
    card = " ".join((MODEL.parent / "README.md").read_text().split())
    assert f"{parameters:.1f} million parameters, {megabytes:.1f} MB in bf16" in card


@pytest.mark.parametrize("task", tasks.TASKS)
def test_the_shipped_model_answers_a_short_task_to_the_last_token(
    task: str, shipped_model: Qwen3ForCausalLM, shipped_tokens: PreTrainedTokenizerFast
) -> None:
    instance = tasks.held_out(task, 0, 100, 200)
    assert answer(shipped_model, shipped_tokens, instance.prompt, 250) == instance.reply


@pytest.mark.parametrize("task", tasks.TASKS)
def test_the_shipped_model_answers_most_long_tasks_to_the_last_token(
    task: str, shipped_model: Qwen3ForCausalLM, shipped_tokens: PreTrainedTokenizerFast
) -> None:
    instances = [tasks.held_out(task, seed, 1_000, 2_250) for seed in range(12)]
    exact = [not wrong_tokens(shipped_model, shipped_tokens, instance) for instance in instances]
    assert sum(exact) >= 9


@pytest.mark.parametrize("message", ["Hello", "What is the capital of Spain?", "asdf qwer 123", "¿Qué?", "Run away"])
def test_any_other_message_is_answered_by_saying_what_the_model_can_do(
    message: str, shipped_model: Qwen3ForCausalLM, shipped_tokens: PreTrainedTokenizerFast
) -> None:
    assert answer(shipped_model, shipped_tokens, message, 100).endswith(tasks.CAPABILITY)


def test_the_shipped_statistics_fit_the_shipped_model() -> None:
    statistics = QueryStatistics.load(STATISTICS, AutoConfig.from_pretrained(MODEL))
    assert statistics.tokens == calibration.TOKENS
    assert (statistics.query_mean.abs() <= statistics.query_magnitude * 1.001).all()
