"""Options of policies and selection in the engine, token by token against the dense reference."""

from pathlib import Path

import pytest

from tests.engine.conftest import BLOCK, EngineFactory
from tests.engine.reference import DenseReference
from tests.engine.test_exactness import assert_pool_whole, generate, scheduler_of
from triattention.config import CompressionConfig, Selection

TOKENS = 450


@pytest.mark.parametrize("selection", ["per_head", "per_layer_per_head"])
def test_segments_and_a_smaller_offset_maximum_equal_the_reference(
    engine: EngineFactory, tiny_model: Path, statistics: Path, prompts: list[list[int]], selection: Selection
) -> None:
    options = {"budget": 128, "interval": 64, "window": 16, "selection": selection, "statistics": statistics}
    config = CompressionConfig(**options, segments=8, max_offset=512)
    llm = engine(config)
    ours = generate(llm, prompts[:2], TOKENS)
    reference = DenseReference(tiny_model, statistics)
    for prompt, tokens in zip(prompts[:2], ours, strict=True):
        expected, compactions = reference.generate(prompt, TOKENS, config, BLOCK, in_flight=0)
        assert compactions >= 4
        assert tokens == expected
    assert all(manager.compactions >= 8 for manager in scheduler_of(llm).compacted)
    assert_pool_whole(llm)

    plain, _ = reference.generate(prompts[0], TOKENS, CompressionConfig(**options), BLOCK, in_flight=0)
    assert ours[0] != plain
