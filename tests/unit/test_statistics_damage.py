"""Whatever stands in a file of statistics: it loads whole and fitting, or is refused in one sentence that names it."""

import hashlib
import json
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.unit.tiny_models import llama, random_statistics
from triattention.rope import RopeParameters
from triattention.statistics import QueryStatistics, model_facts


@cache
def saved() -> tuple[Path, bytes, dict[str, Any], dict[str, torch.Tensor]]:
    """A good file: its path, bytes, header and tensors."""
    path = Path(mkdtemp()) / "good.safetensors"
    random_statistics(llama()).save(path)
    content = path.read_bytes()
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["triattention"])
    return path, content, header, load_file(path)


LLAMA = RopeParameters.from_config(llama())


def loads_whole_or_is_refused(path: Path) -> None:
    try:
        # Reading a config's RoPE takes a tenth of a second, and is the same every time.
        with patch.object(RopeParameters, "from_config", return_value=LLAMA):
            statistics = QueryStatistics.load(path, llama())
    except ValueError as error:
        refusal = str(error)
    else:
        refusal = ""
    if refusal:
        assert path.name in refusal
        assert "trifleet calibrate" in refusal
        return
    assert statistics.facts == model_facts(llama())
    assert statistics.rope.difference(LLAMA) is None
    assert set(statistics.layers) >= {0, 1, 2}
    for numbers in (statistics.query_mean, statistics.query_magnitude):
        assert numbers.shape == (len(statistics.layers), 4, 8)
        assert numbers.isfinite().all()
    assert (statistics.query_magnitude >= 0).all()


@settings(max_examples=150)
@given(data=st.data())
def test_damaged_bytes(data: st.DataObject) -> None:
    path, content, _, _ = saved()
    damaged = bytearray(content[: data.draw(st.integers(0, len(content)), label="length")])
    for place in data.draw(st.lists(st.integers(0, max(0, len(damaged) - 1)), max_size=3), label="places"):
        if damaged:
            damaged[place] = data.draw(st.integers(0, 255), label="byte")
    broken = path.with_name("broken.safetensors")
    broken.write_bytes(damaged)
    loads_whole_or_is_refused(broken)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 40) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=150)
@given(name=st.sampled_from(sorted(saved()[2])), value=JSON)
@example(name="layers", value=[0, 0, 1])
@example(name="layers", value=[[0], [1], [2]])
@example(name="tokens", value=[])
@example(name="facts", value={})
def test_any_value_in_any_field_of_the_header(name: str, value: Any) -> None:
    path, _, header, tensors = saved()
    strange = header | {name: value}
    if name == "facts":
        strange["config_digest"] = _digest(value)
    broken = path.with_name("header.safetensors")
    save_file(tensors, broken, metadata={"triattention": json.dumps(strange)})
    loads_whole_or_is_refused(broken)


@settings(max_examples=100)
@given(name=st.sampled_from(sorted(saved()[2]["rope"])), value=JSON | st.lists(st.floats(), max_size=9))
def test_any_value_in_any_field_of_rope(name: str, value: Any) -> None:
    path, _, header, tensors = saved()
    strange = header | {"rope": header["rope"] | {name: value}}
    broken = path.with_name("rope.safetensors")
    save_file(tensors, broken, metadata={"triattention": json.dumps(strange)})
    loads_whole_or_is_refused(broken)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int32])
def test_numbers_of_another_type(dtype: torch.dtype) -> None:
    path, _, header, tensors = saved()
    broken = path.with_name("dtype.safetensors")
    save_file(
        {name: tensor.to(dtype) for name, tensor in tensors.items()},
        broken,
        metadata={"triattention": json.dumps(header)},
    )
    loads_whole_or_is_refused(broken)


def test_a_negative_magnitude() -> None:
    path, _, header, tensors = saved()
    broken = path.with_name("negative.safetensors")
    magnitude = tensors["query_magnitude"].clone()
    magnitude[1, 2, 3] *= -1
    save_file(tensors | {"query_magnitude": magnitude}, broken, metadata={"triattention": json.dumps(header)})
    loads_whole_or_is_refused(broken)


def _digest(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
