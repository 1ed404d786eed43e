"""The training of the bundled model: its data, its network, its loss and its checkpoint."""

from dataclasses import replace

import pytest
import torch
from transformers import Qwen3ForCausalLM

from bundled import curriculum, expected, network, tasks, tokenizer, train
from tests.unit.tiny_models import random_statistics
from triattention.scoring import Scorer

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
    assert len(trained) > 150
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
        hidden, _ = ours(ids, positions)
        reference = theirs.model(ids, position_ids=positions, attention_mask=torch.ones_like(ids)).last_hidden_state
    torch.testing.assert_close(hidden, reference, rtol=1e-3, atol=1e-3)


def sharp_network() -> network.Network:
    """Random weights, and query and key norms so large that most attention is on few keys, far or near."""
    torch.manual_seed(4)
    made = network.Network(network.model_config(len(TOKENS)))
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if "q_norm" in name or "k_norm" in name:
                weight.fill_(2.0)
    return made


def test_keys_that_are_read_late_are_scored_as_triattention_scores_them() -> None:
    made, batch = sharp_network(), curriculum.Curriculum(TOKENS).batch(7, 3)
    with torch.inference_mode():
        _, reads = made(batch.ids, batch.positions)
        found = expected.unforeseen_reads(reads, batch, made)
    cos, sin = made.rotation(batch.positions)
    real, short = batch.ids != 0, []
    for layer, (queries, keys) in enumerate(reads):
        bands = torch.complex(*queries.chunk(2, dim=-1)).transpose(1, 2)[real]  # [tokens, heads, bands]
        statistics = replace(
            random_statistics(network.model_config(len(TOKENS))),
            layers=(layer,),
            query_mean=bands.mean(dim=0)[None],
            query_magnitude=bands.abs().mean(dim=0)[None],
        )
        scorer = Scorer(statistics, [layer], range(keys.shape[1]))
        queries, keys = network.rotate(queries, cos, sin), network.rotate(keys, cos, sin)
        for row, labels in enumerate(batch.labels):
            trained = (labels != curriculum.IGNORED).nonzero()
            reply = slice(int(trained[0]), int(trained[-1]) + 1)
            scores = scorer.score(keys[row, None, :, reply], int(batch.positions[row, -1]))[0]
            length = scores.shape[-1]
            late = torch.ones(length, length, dtype=torch.bool).tril(-1 - expected.RECENT)
            past = torch.ones(labels.shape[0], labels.shape[0], dtype=torch.bool).tril()
            for head, query in enumerate(queries[row].unflatten(0, (keys.shape[1], -1))):
                products = query @ keys[row, head].T / keys.shape[-1] ** 0.5
                weights = products.where(past, -torch.inf).softmax(dim=-1)[:, reply, reply]
                read = ((weights > expected.READ) & late).any(dim=(0, 1))
                short += (expected.FORESEEN - scores[head][read]).clamp(min=0).tolist()
    assert len(short) > 100
    assert found.item() == pytest.approx(sum(short) / len(short), rel=1e-3)


def test_where_no_old_key_is_read_nothing_is_unforeseen() -> None:
    made, batch = sharp_network(), curriculum.Curriculum(TOKENS).batch(7, 3)
    with torch.no_grad():
        for layer in made.layers:
            layer.self_attn.q_norm.weight.zero_()  # the same attention on all keys, which is little on each
    _, reads = made(batch.ids, batch.positions)
    assert expected.unforeseen_reads(reads, batch, made).item() == 0


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


def test_a_run_that_goes_on_says_so_and_that_it_takes_nothing_from_another_model(tmp_path, capsys) -> None:
    checkpoint = tmp_path / "bundled.pt"
    train.Trainer(TOKENS, compile=False).save(checkpoint)
    train.train(1, 0, tmp_path / "old", tmp_path / "out", checkpoint, compile=False, threads=1)
    said = capsys.readouterr().out
    assert f"{checkpoint} is of an earlier run, which goes on from its step 0." in said
    assert f"Nothing is taken from {tmp_path / 'old'}: for a new run, remove {checkpoint} or set --checkpoint." in said


def test_a_run_that_starts_from_a_model_begins_with_what_it_knows(tmp_path) -> None:
    known, started = (train.Trainer(TOKENS, compile=False) for _ in range(2))
    with torch.no_grad():
        for weight in known.network.parameters():
            weight += 0.1 * torch.randn_like(weight)
    train.export(known.averaged() | known.network.layers.state_dict(prefix="layers."), known.config, tmp_path)
    started.start_from(tmp_path)
    for name, weight in known.network.layers.named_parameters():
        torch.testing.assert_close(started.network.layers.get_parameter(name), weight, rtol=0, atol=0.02)
    before, after = known.averaged()["embed_tokens.weight"], started.averaged()["embed_tokens.weight"]
    rows = TOKENS.get_vocab()
    torch.testing.assert_close(after[rows["Ġdepth"]], before[rows["Ġdepth"]], rtol=0, atol=0.02)
    torch.testing.assert_close(after[rows["Ġ7?"]], before[rows["Ġ7?"]], rtol=0, atol=0.02)
    own = 1 + rows["Ġ3>7"]
    assert started.network.get_parameter(train.VECTORS)[own].abs().max() == 0
