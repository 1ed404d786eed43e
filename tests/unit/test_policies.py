"""Policies by name: each scores as its paper says, and users can add their own."""

from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch

from tests.unit.hole_fills import hole_fills
from tests.unit.tiny_models import qwen3, random_statistics
from triattention.config import CompressionConfig
from triattention.policies import Policy, PolicyContext, create_policy, policy_names, register
from triattention.policies.base import _factories
from triattention.policies.random import Random
from triattention.rope import RopeParameters
from triattention.scoring import Scorer
from triattention.selection import select

MODEL = qwen3(num_attention_heads=8, num_key_value_heads=4)


def context(layers: tuple[int, ...] = (0, 1, 2), kv_heads: range = range(4)) -> PolicyContext:
    return PolicyContext(
        layers=layers,
        kv_heads=kv_heads,
        total_kv_heads=4,
        q_heads=8,
        head_dim=16,
        rope=RopeParameters.from_config(MODEL),
        model_config=MODEL,
    )


def config(policy: str, statistics: Path | None = None, **options: int) -> CompressionConfig:
    return CompressionConfig(budget=64, window=16, policy=policy, statistics=statistics, **options)


def random_keys(tokens: int = 40) -> torch.Tensor:
    return torch.randn(3, 4, tokens, 16, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def statistics(tmp_path: Path) -> Path:
    path = tmp_path / "statistics.safetensors"
    random_statistics(MODEL).save(path)
    return path


@pytest.fixture
def registry() -> Iterator[None]:
    before = dict(_factories)
    yield
    _factories.clear()
    _factories.update(before)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2], ids=str
)
@pytest.mark.parametrize("name", ["triattention", "random", "streaming", "key_norm", "keydiff"])
def test_every_policy_returns_finite_fp32_scores(name: str, dtype: torch.dtype, statistics: Path) -> None:
    assert name in policy_names()
    keys = random_keys().to(dtype)
    before = keys.float()
    scores = create_policy(config(name, statistics), context()).score(keys, position=1000)
    assert scores.shape == (3, 4, 40)
    assert scores.dtype == torch.float32
    assert scores.isfinite().all()
    assert torch.equal(keys.float(), before)


@pytest.mark.parametrize("name", ["triattention", "random", "streaming", "key_norm", "keydiff"])
def test_every_policy_scores_a_rank_as_it_scores_the_whole(name: str, statistics: Path) -> None:
    keys = random_keys()
    whole = create_policy(config(name, statistics), context()).score(keys, 1000)
    ranks = [
        create_policy(config(name, statistics), context(kv_heads=heads)).score(keys[:, list(heads)], 1000)
        for heads in (range(0, 2), range(2, 4))
    ]
    torch.testing.assert_close(torch.cat(ranks, dim=1), whole)
    layers = create_policy(config(name, statistics), context(layers=(2, 0))).score(keys[[2, 0]], 1000)
    torch.testing.assert_close(layers, whole[[2, 0]])


def test_triattention_uses_the_statistics_and_the_position(statistics: Path) -> None:
    keys = random_keys()
    policy = create_policy(config("triattention", statistics), context())
    expected = Scorer(random_statistics(MODEL), range(3), range(4))
    assert torch.equal(policy.score(keys, 1000), expected.score(keys, 1000))
    assert not torch.allclose(policy.score(keys, 1000), policy.score(keys, 1100))


def test_triattention_averages_up_to_the_largest_offset(statistics: Path) -> None:
    keys = random_keys()
    policy = create_policy(config("triattention", statistics, max_offset=128), context())
    expected = Scorer(random_statistics(MODEL), range(3), range(4), offsets=(1, 2, 4, 8, 16, 32, 64, 128))
    assert torch.equal(policy.score(keys, 1000), expected.score(keys, 1000))
    assert not torch.allclose(
        policy.score(keys, 1000), Scorer(random_statistics(MODEL), range(3), range(4)).score(keys, 1000)
    )


def test_triattention_refuses_statistics_that_lack_a_layer(tmp_path: Path) -> None:
    smaller = random_statistics(qwen3(num_attention_heads=8, num_key_value_heads=4, num_hidden_layers=2))
    smaller.save(tmp_path / "s")
    with pytest.raises(ValueError, match="num_hidden_layers 2 but this model has 3"):
        create_policy(config("triattention", tmp_path / "s"), context())


def test_key_norm_prefers_small_keys() -> None:
    keys = random_keys()
    scores = create_policy(config("key_norm"), context()).score(keys, 40)
    assert torch.equal(scores.argmax(-1), keys.norm(dim=-1).argmin(-1))
    assert torch.equal(scores.argmin(-1), keys.norm(dim=-1).argmax(-1))


def test_keydiff_prefers_the_key_unlike_the_others() -> None:
    keys = torch.ones(3, 4, 10, 16) + 0.01 * random_keys(10)
    keys[:, :, 7] *= -3
    scores = create_policy(config("keydiff"), context()).score(keys, 10)
    assert (scores.argmax(-1) == 7).all()


def test_norm_and_difference_scores_have_one_scale_in_all_layers() -> None:
    keys = random_keys()
    keys[1] *= 1000
    for name in ("key_norm", "keydiff"):
        scores = create_policy(config(name), context()).score(keys, 40)
        torch.testing.assert_close(scores.std(-1, correction=0), torch.ones(3, 4))


def test_random_repeats_itself_and_varies_with_all_that_it_names() -> None:
    keys = random_keys(1000)
    scores = Random(config("random"), context()).score(keys, 500)
    assert torch.equal(scores, Random(config("random"), context()).score(keys * 2, 500))
    assert not torch.equal(scores, Random(config("random"), context()).score(keys, 501))
    assert not torch.equal(scores, Random(config("random", seed=1), context()).score(keys, 500))
    rows = scores.flatten(0, 1)
    correlation = torch.corrcoef(rows) - torch.eye(12)
    assert correlation.abs().max() < 0.2
    assert 0 <= scores.min() < 0.01
    assert 0.99 < scores.max() < 1
    assert scores.mean() == pytest.approx(0.5, abs=0.02)


def test_random_scores_are_pinned_so_that_runs_can_be_compared_over_time() -> None:
    scores = Random(config("random"), context()).score(random_keys(4), 128)
    assert (scores[0, 0] * (1 << 24)).long().tolist() == [2276114, 13075089, 5886610, 11320435]


class Newest(Policy):
    def __init__(self, config: CompressionConfig, context: PolicyContext) -> None:
        self.budget = config.budget

    def score(self, keys: torch.Tensor, position: int) -> torch.Tensor:
        return torch.arange(keys.shape[2]).float().expand(keys.shape[:3])


@pytest.mark.usefixtures("registry")
def test_a_policy_of_ones_own_is_created_by_name() -> None:
    register("newest")(Newest)
    policy = create_policy(config("newest"), context())
    assert isinstance(policy, Newest)
    assert policy.budget == 64
    with pytest.raises(ValueError, match='"newest" is already registered'):
        register("newest")(Newest)


@pytest.mark.usefixtures("registry")
def test_a_policy_of_an_installed_package_is_found_without_an_import(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "their_policies.py").write_text(
        "from tests.unit.test_policies import Newest\n"
        "from triattention.policies import register\n"
        "register('theirs')(Newest)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    entry = EntryPoint("theirs", "their_policies", "triattention.policies")
    monkeypatch.setattr(
        "triattention.policies.base.entry_points",
        lambda group, name=None: [entry] if group == entry.group and name in (None, entry.name) else [],
    )
    assert "theirs" in policy_names()
    assert type(create_policy(config("theirs"), context())).__name__ == "Newest"


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r'policy is "h2o".*key_norm, keydiff, random, streaming, triattention'):
        create_policy(config("h2o"), context())


def test_a_context_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="must name some of the 4 KV heads"):
        context(kv_heads=range(3, 5))


def test_streaming_keeps_exactly_the_slots_that_survive_the_cut() -> None:
    scores = create_policy(config("streaming"), context()).score(random_keys(), 40)
    kept = select(scores, keep=24, window=4, selection="per_head")
    assert kept[..., 16:].all()
    assert hole_fills(kept, dead_slots=16).source.numel() == 0
