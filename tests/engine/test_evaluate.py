"""`trifleet evaluate`'s engine: it wants KV memory for the problems, not for the model's whole context."""

import pickle
from dataclasses import replace
from pathlib import Path

import pytest

import bundled
from benchmarks.quality.engine import run, run_cell
from benchmarks.quality.problems import Problem, held_out

KV_BYTES = 8 << 20
"""Of the bundled model's context, 32,768 tokens, it holds a small part."""


def problem(max_tokens: int) -> Problem:
    return Problem("echo", "hello", max_tokens, lambda reply: True)


def test_a_model_of_a_long_context_answers_short_problems_in_little_kv_memory() -> None:
    replies = run(bundled.MODEL, None, [problem(max_tokens=8)], 1, KV_BYTES).replies
    assert [reply.tokens for reply in replies] == [8]


def test_a_reply_that_is_cut_off_is_wrong_whatever_stands_in_it() -> None:
    whole = held_out("needle", 1, 100, 200)[0]
    cut = replace(whole, max_tokens=30, is_correct=lambda reply: True)
    replies = run(bundled.MODEL, None, [whole, cut], 2, KV_BYTES).replies
    assert [reply.correct for reply in replies] == [True, False]


def test_memory_that_does_not_hold_the_longest_problem_is_refused_by_its_options_name() -> None:
    with pytest.raises(ValueError, match=r"--kv-cache-mib is 8, but .* GiB of KV memory: raise --kv-cache-mib"):
        run(bundled.MODEL, None, [problem(max_tokens=8), problem(max_tokens=30_000)], 1, KV_BYTES)


def test_a_reply_longer_than_the_models_context_is_refused_before_an_engine_starts() -> None:
    with pytest.raises(ValueError, match=r"exceed the model's 32768: shorten the prompt or lower --max-tokens"):
        run(bundled.MODEL, None, [problem(max_tokens=40_000)], 1, KV_BYTES)


def test_what_vllm_refuses_reaches_the_command_as_one_sentence(tmp_path: Path) -> None:
    """vLLM's error here is pydantic's, which cannot be pickled."""
    (tmp_path / "config.json").write_text('{"architectures": ["Qwen3ForCausalLM"]}')
    with pytest.raises(ValueError, match=f"^Unrecognized model in {tmp_path}.*config.json.$") as refused:
        run_cell(tmp_path, None, [problem(max_tokens=8)], 1, KV_BYTES, 0)
    assert type(pickle.loads(pickle.dumps(refused.value))) is ValueError
