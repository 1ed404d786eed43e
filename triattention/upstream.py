"""Import of the statistics that upstream's TriAttention writes, `torch.save` files, without running what is in them.

The file is `{"metadata": {...}, "stats": {"layer00_head00": {...}}}`, one entry per query head, with fp tensors
[head_dim / 2] `q_mean_real`, `q_mean_imag` and `q_abs_mean`: E q and E|q| before RoPE. The metadata names `head_dim`,
`rope_style` ("half" or "interleaved") and `rope_type`, but neither the model nor its frequencies: those are taken from
the model that the caller names, so naming the right one is the caller's word.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from triattention.rope import RopeParameters, read_config
from triattention.statistics import QueryStatistics, model_facts

_STYLES = {"half": "neox", "interleaved": "gptj"}


def import_statistics(path: Path, model: str | Path, config: PreTrainedConfig | None = None) -> QueryStatistics:
    """Query statistics of `model` (folder or id) from upstream's `.pt` file.

    `config`: of the model, where it is not served with the one that it comes with.

    `tokens` of the result is 0: upstream does not record it. Whether the queries were taken after the query norm cannot
    be told from the file; one of upstream's scripts takes them before it. Raises ValueError, one sentence, where the
    file is not such a file or does not fit the model.
    """
    metadata, entries = _read(path)
    config = config or read_config(model)
    facts, rope = model_facts(config), RopeParameters.from_config(config)
    if rope.rotary_dim != rope.head_dim:
        raise ValueError(
            f"{model} rotates {rope.rotary_dim} of {rope.head_dim} numbers per head, and upstream's statistics say "
            "nothing about the others: run `trifleet calibrate --text` for this model"
        )
    ours = {"head_dim": rope.head_dim, "rope_style": rope.style, "rope_type": _rope_type(config)}
    theirs = metadata | {"rope_style": _STYLES.get(metadata.get("rope_style", "half"), metadata.get("rope_style"))}
    for name, value in ours.items():
        if theirs.get(name, value) not in (value, None):
            raise ValueError(
                f"statistics {path} were made for a model with {name} {metadata[name]} but {model} has {value}: name "
                "the model that they were made for"
            )
    layers, heads = range(facts["num_hidden_layers"]), range(facts["num_attention_heads"])
    beyond = sorted(set(entries) - {_key(layer, head) for layer in layers for head in heads})
    if beyond:
        raise ValueError(
            f"statistics {path} hold {beyond[0]}, but {model} has {len(layers)} layers of {len(heads)} query heads: "
            "name the model that they were made for"
        )
    shape = (len(layers), len(heads), rope.bands)
    mean, magnitude = torch.empty(shape, dtype=torch.complex64), torch.empty(shape)
    for layer in layers:
        for head in heads:
            real, imag, size = (_numbers(path, entries, _key(layer, head), name, rope.bands) for name in _NAMES)
            mean[layer, head] = torch.complex(real, imag)
            magnitude[layer, head] = size
    return QueryStatistics(
        model_id=Path(model).name,
        facts=facts,
        rope=rope,
        layers=tuple(layers),
        tokens=0,
        query_mean=mean,
        query_magnitude=magnitude,
    )


_NAMES = ("q_mean_real", "q_mean_imag", "q_abs_mean")


def _key(layer: int, head: int) -> str:
    return f"layer{layer:02d}_head{head:02d}"


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    if not path.is_file():
        raise ValueError(f"there is no file {path}: correct the path")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        metadata, entries = dict(content["metadata"]), dict(content["stats"])
    except Exception as error:  # torch's restricted unpickler stumbles over other files in many ways
        reason = str(error).split("\n")[0]
        raise ValueError(f"{path} is not a statistics file of upstream's TriAttention ({reason})") from error
    return metadata, entries


def _numbers(path: Path, entries: dict[str, Any], key: str, name: str, bands: int) -> Tensor:
    if key not in entries:
        raise ValueError(f"statistics {path} lack {key}: calibrate all heads, or run `trifleet calibrate --text`")
    values = entries[key].get(name) if isinstance(entries[key], dict) else None
    if not isinstance(values, Tensor) or values.shape != (bands,) or not values.isfinite().all():
        raise ValueError(f"statistics {path} hold no {bands} finite numbers as {name} of {key}")
    return values.float()


def _rope_type(config: Any) -> str:
    parameters = getattr(config.get_text_config(), "rope_parameters", None) or {}
    return str(parameters.get("rope_type", "default"))
