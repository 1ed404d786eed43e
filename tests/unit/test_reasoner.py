"""The training of a model for the three tasks: its data, its network, its checkpoint and its tokenizer."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Qwen3ForCausalLM

from bundled.reasoner import curriculum, network, tasks, tokenizer, train

TOKENS = tokenizer.build()


def test_held_out_instances_are_not_among_the_first_training_batches() -> None:
    batches = curriculum.Curriculum(TOKENS)
    trained = {tuple(row.tolist()) for number in range(30) for row in batches.batch(number, 3).ids}
    held_out = [tasks.held_out(task, seed, 300, 700) for task in tasks.TASKS for seed in range(50)]
    turns = {
        tuple(
            TOKENS.apply_chat_template(
                [{"role": "user", "content": instance.prompt}, {"role": "assistant", "content": instance.reply}],
                tokenize=True,
                return_dict=False,
            )
        )
        for instance in held_out
    }
    assert len({turn for turn in turns if len(turn) > 50}) > 100
    assert len(trained) > 200
    assert not {tuple(token for token in row if token) for row in trained} & turns
    calibrated = {
        tasks.instance(f"calibration {n}", task, n, 300, 700).prompt for task in tasks.TASKS for n in range(50)
    }
    assert not calibrated & {instance.prompt for instance in held_out}


def test_a_batch_is_the_same_whenever_it_is_made() -> None:
    one, other = (curriculum.Curriculum(TOKENS).batch(1_900, 4) for _ in range(2))
    assert torch.equal(one.ids, other.ids)
    assert torch.equal(one.positions, other.positions)
    assert torch.equal(one.labels, other.labels)


def test_only_replies_are_trained_on_and_a_line_after_a_jump_is_not() -> None:
    batches = curriculum.Curriculum(TOKENS)
    assistant = TOKENS.convert_tokens_to_ids(tokenizer.ASSISTANT)
    newline = TOKENS.encode("\n", add_special_tokens=False)[0]
    jumps = 0
    for number in range(20):
        batch = batches.batch(number, 4)
        for ids, positions, labels in zip(batch.ids, batch.positions, batch.labels, strict=True):
            first = (ids == assistant).nonzero()[0].item()
            assert (labels[: first + 1] == curriculum.IGNORED).all()
            assert ((labels == ids) | (labels == curriculum.IGNORED)).all()
            steps = positions.diff()
            for place in (steps > 1).nonzero().flatten().tolist():
                jumps += 1
                assert ids[place] == newline
                ends = (ids[place + 1 :] == newline).nonzero().flatten().tolist()
                end = place + 1 + ends[0] if ends else len(ids) - 1
                assert (labels[place + 1 : end + 1] == curriculum.IGNORED).all()
    assert jumps > 20


def test_the_training_network_computes_what_transformers_qwen3_computes(tmp_path) -> None:
    torch.manual_seed(3)
    config = network.model_config(len(TOKENS))
    ours = network.Network(config)
    with torch.no_grad():
        for weight in ours.parameters():
            weight.copy_((weight + 0.05 * torch.randn_like(weight)).bfloat16())  # what an export keeps
    train.export(ours.state_dict(), config, tmp_path)
    theirs = Qwen3ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = torch.randint(0, len(TOKENS), (2, 50))
    positions = torch.stack((torch.arange(50), torch.arange(50) + 1_000))
    with torch.inference_mode():
        hidden = ours(ids, positions)
        expected = theirs.model(ids, position_ids=positions, attention_mask=torch.ones_like(ids)).last_hidden_state
    torch.testing.assert_close(hidden, expected, rtol=1e-3, atol=1e-3)


def test_training_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(curriculum, "BATCH_TOKENS", 384)
    whole, half = tmp_path / "whole.pt", tmp_path / "half.pt"
    batches = curriculum.Curriculum(TOKENS)
    trainer = train.Trainer(TOKENS, compile=False)
    losses = [trainer.train(batches.batch(number, trainer.level), 0.1, None) for number in range(3)]
    trainer.save(whole)
    trainer = train.Trainer(TOKENS, compile=False)
    again = [trainer.train(batches.batch(number, trainer.level), 0.1, None) for number in range(2)]
    trainer.save(half)
    trainer = train.Trainer(TOKENS, compile=False)
    trainer.load(half)
    again.append(trainer.train(batches.batch(trainer.step, trainer.level), 0.1, None))
    assert again == pytest.approx(losses, rel=1e-3)


@given(st.text(max_size=300))
def test_any_text_survives_the_tokenizer(text: str) -> None:
    assert TOKENS.decode(TOKENS.encode(text, add_special_tokens=False)) == text


@given(st.sampled_from([" mo<ka", " 3-7 7? seen 12\n", "Run: 1:a+b", "<|end|>", "<|user|>"]), st.text(max_size=20))
def test_text_that_mixes_words_of_the_tasks_with_anything_survives_the_tokenizer(known: str, other: str) -> None:
    text = other + known + other
    assert TOKENS.decode(TOKENS.encode(text, add_special_tokens=False)) == text


def test_every_word_of_a_task_is_one_token() -> None:
    for task in tasks.TASKS:
        instance = tasks.held_out(task, 1, 1_000, 1_300)
        assert len(TOKENS.encode(instance.prompt, add_special_tokens=False)) == len(instance.prompt.split())
