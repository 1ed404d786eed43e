"""The collapsed score equals the plain mean over 17 future offsets, in fp64 and by position."""

from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedConfig

from tests.unit.test_rope import CONFIGS
from tests.unit.tiny_models import llama, qwen3, random_statistics, yarn
from triattention.rope import RopeParameters
from triattention.scoring import OFFSETS, Scorer, mean_rotation, standardise
from triattention.statistics import QueryStatistics


def plain_scores(
    statistics: QueryStatistics, keys: torch.Tensor, key_positions: torch.Tensor, query_position: int
) -> torch.Tensor:
    """Section 4 of the design word for word, fp64 [layers, q_heads, tokens]; `keys` [layers, kv_heads,
    tokens, head_dim] are NOT rotated here, and a band counts with attention_scaling squared.
    """
    rope = statistics.rope
    group = statistics.q_heads // statistics.kv_heads
    k = rope.as_complex(keys.double()).repeat_interleave(group, dim=1)
    mean = statistics.query_mean.to(torch.complex128)[:, :, None, :]
    magnitude = statistics.query_magnitude.double()[:, :, None, :]
    scale = rope.scales() ** 2
    phase = mean.angle() - k.angle()
    norm = (scale * (magnitude - mean.abs()) * k.abs()).sum(-1)
    total = torch.zeros_like(norm)
    for offset in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536):
        distance = (query_position - key_positions + offset).double()
        turn = rope.frequencies() * distance[:, None]
        total += (scale * mean.abs() * k.abs() * torch.cos(turn + phase)).sum(-1) + norm
    return total / 17


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


def keys_at(rope: RopeParameters, positions: torch.Tensor, kv_heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random keys of three layers before RoPE, and the same as fp32 cache content."""
    keys = torch.randn(3, kv_heads, len(positions), rope.head_dim, generator=torch.Generator().manual_seed(1))
    return keys, rope.rotate(keys, positions).float()


@pytest.mark.parametrize("last", [100, 4096, 131072])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_collapsed_offsets_equal_the_plain_sum(config: PreTrainedConfig, last: int) -> None:
    statistics = random_statistics(config)
    positions = torch.randperm(last)[:50]
    keys, cached = keys_at(statistics.rope, positions, statistics.kv_heads)
    scorer = Scorer(statistics, range(3), range(statistics.kv_heads))
    actual = scorer.raw_scores(cached, position=last)
    expected = plain_scores(statistics, keys, positions, last)
    assert relative_error(actual.flatten(1, 2), expected) < 1e-4


def test_offsets_are_the_powers_of_two_to_65536() -> None:
    assert OFFSETS == (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)


def test_mean_rotation_keeps_its_phase_at_position_131072() -> None:
    frequencies = torch.tensor([1.0, 0.731, 1e-4, 0.0], dtype=torch.float64)
    actual = mean_rotation(frequencies, 131072)
    for f, value in zip(frequencies.tolist(), actual, strict=True):
        terms = [torch.exp(torch.tensor(1j * f * (131072 + d), dtype=torch.complex128)) for d in OFFSETS]
        assert abs(sum(terms) / 17 - value) < 1e-9


def test_a_key_that_its_query_will_read_scores_above_one_that_it_will_not() -> None:
    """Sign of the conjugation: a slow band whose key has the query's phase must win over the opposite
    phase.
    """
    config = llama()
    statistics = random_statistics(config)
    slow = statistics.rope.bands - 1
    mean = torch.zeros_like(statistics.query_mean)
    mean[..., slow] = 1j
    statistics = replace(statistics, query_mean=mean, query_magnitude=mean.abs())
    frequencies = statistics.rope.frequencies().clone()
    frequencies[slow] = 1e-6
    statistics = replace(statistics, rope=replace(statistics.rope, inv_freq=tuple(frequencies.tolist())))
    bands = torch.zeros(3, 2, 2, statistics.rope.bands, dtype=torch.complex64)
    bands[..., 0, slow], bands[..., 1, slow] = 1j, -1j
    cached = statistics.rope.rotate(statistics.rope.as_heads(bands), torch.tensor([10, 20])).float()
    scores = Scorer(statistics, range(3), range(2)).score(cached, position=30)
    assert (scores[..., 0] > scores[..., 1]).all()


def test_group_score_is_the_maximum_of_its_query_heads_z_scores() -> None:
    statistics = random_statistics(qwen3(num_attention_heads=6, num_key_value_heads=2))
    positions = torch.arange(40)
    keys, cached = keys_at(statistics.rope, positions, 2)
    plain = plain_scores(statistics, keys, positions, 40)
    z = (plain - plain.mean(-1, keepdim=True)) / plain.std(-1, correction=0, keepdim=True)
    expected = torch.stack([z[:, 0:3].amax(1), z[:, 3:6].amax(1)], dim=1)
    actual = Scorer(statistics, range(3), range(2)).score(cached, position=40)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected.float(), atol=1e-3, rtol=0)


def test_ranks_and_subsets_of_layers_score_as_the_whole_does() -> None:
    statistics = random_statistics(qwen3(num_attention_heads=8, num_key_value_heads=4))
    _, cached = keys_at(statistics.rope, torch.arange(30), 4)
    whole = Scorer(statistics, range(3), range(4)).score(cached, position=30)
    for layers, heads in [((0, 2), range(0, 2)), ((2, 1), range(2, 4)), ((1,), range(3, 4))]:
        part = Scorer(statistics, layers, heads).score(cached[list(layers)][:, list(heads)], position=30)
        torch.testing.assert_close(part, whole[list(layers)][:, list(heads)])


def test_scores_follow_their_tokens_when_slots_are_permuted() -> None:
    statistics = random_statistics(llama())
    _, cached = keys_at(statistics.rope, torch.arange(30), 2)
    order = torch.randperm(30)
    scorer = Scorer(statistics, range(3), range(2))
    torch.testing.assert_close(scorer.score(cached[:, :, order], 30), scorer.score(cached, 30)[..., order])


def test_reading_keys_in_slices_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    statistics = random_statistics(yarn())
    _, cached = keys_at(statistics.rope, torch.arange(50), 2)
    scorer = Scorer(statistics, range(3), range(2))
    whole = scorer.raw_scores(cached, 50)
    monkeypatch.setattr("triattention.scoring._SLICE_BYTES", 7 * 4 * 3 * 2 * 16)
    torch.testing.assert_close(scorer.raw_scores(cached, 50), whole)


def test_half_precision_keys_score_like_the_same_numbers_in_fp32() -> None:
    statistics = random_statistics(llama())
    _, cached = keys_at(statistics.rope, torch.arange(50), 2)
    scorer = Scorer(statistics, range(3), range(2))
    half = cached.bfloat16()
    assert torch.equal(scorer.score(half, 50), scorer.score(half.float(), 50))


def test_standardise_gives_mean_zero_and_deviation_one_and_zero_for_equal_scores() -> None:
    scores = torch.randn(3, 100) * 50 + 7
    z = standardise(scores)
    torch.testing.assert_close(z.mean(-1), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(z.std(-1, correction=0), torch.ones(3))
    assert standardise(torch.full((2, 77), 0.1)).eq(0).all()
    assert standardise(torch.zeros(2, 5)).eq(0).all()
