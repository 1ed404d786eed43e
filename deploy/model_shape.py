"""What a model weighs and what a token of it costs in KV memory, read from its config.json. No weights are loaded.

Owns the reading of configs and of quantization; what follows for a GPU is `deploy/plan.py`'s.
"""

import json
import re
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

PRESETS = Path(__file__).parent / "presets"
_BYTES_PER_VALUE = {"float32": 4, "bfloat16": 2, "float16": 2}
_SCALE_BITS = 16


class ModelError(ValueError):
    """The model cannot be planned for; the message is one sentence."""


@dataclass(frozen=True)
class ModelShape:
    """Sizes of one model. Bytes are of the whole model, before it is split over GPUs."""

    name: str
    full_layers: int
    """Layers with full attention: their KV grows with the request, and compaction bounds it."""
    sliding_layers: int
    sliding_window: int
    """Tokens; 0 where no layer slides."""
    attention_heads: int
    kv_heads: int
    head_dim: int
    bytes_per_value: int
    """Of keys and values in the cache: the model's own dtype."""
    weights_bytes: int
    weights_sum: str
    """How `weights_bytes` came about, for people."""

    def bytes_per_token(self, layers: int, tensor_parallel: int = 1) -> int:
        """Keys and values of one token in so many layers on each GPU. Heads are replicated when they are too few."""
        heads = -(-self.kv_heads // tensor_parallel)
        return 2 * layers * heads * self.head_dim * self.bytes_per_value


def presets() -> list[str]:
    return sorted(file.stem for file in PRESETS.glob("*.json"))


def read_shape(model: str, weights_bytes: int | None = None) -> ModelShape:
    """The shape of a model: a preset's name, a config.json, or a folder that holds one.

    Where `weights_bytes` is not given, the weights count as they lie in the folder; if none do, the parameters are
    counted on transformers' own skeleton of the model, and the quantization says how many bits each has.
    Raises `ModelError`.
    """
    file, name = _config_file(model)
    # Here, because transformers takes seconds to import and `trifleet --help` must not.
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM

    from triattention.statistics import kv_heads

    try:
        values = json.loads(file.read_text())
        if not isinstance(values, dict):
            raise TypeError("it holds no JSON object")
        quantization: dict[str, Any] | None = values.pop("quantization_config", None)
        config = AutoConfig.for_model(**values).get_text_config()
    except (KeyError, TypeError, ValueError, OSError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"{file} is not a model's config.json that transformers knows: {reason}") from None
    full, sliding = _layers(config, file)
    dtype = str(config.dtype or "bfloat16").removeprefix("torch.")
    if dtype not in _BYTES_PER_VALUE:
        raise ModelError(f"The dtype of {file} is {dtype}: KV memory is known for {', '.join(_BYTES_PER_VALUE)}.")
    if weights_bytes is not None:
        weights, how = weights_bytes, "as given"
    elif on_disk := _bytes_on_disk(file.parent):
        weights, how = on_disk, "as they lie on disk"
    else:
        try:
            with torch.device("meta"):
                skeleton = AutoModelForCausalLM.from_config(config)
        except (AttributeError, ImportError, KeyError, TypeError, ValueError):
            raise ModelError(
                f"transformers makes no text model of the {type(config).__name__} in {file}, so its parameters cannot "
                "be counted: give the size of the weights, --weights-gib."
            ) from None
        weights, how = _weights(skeleton, _BYTES_PER_VALUE[dtype] * 8, quantization)
    heads = config.num_attention_heads
    return ModelShape(
        name=name,
        full_layers=full,
        sliding_layers=sliding,
        sliding_window=config.sliding_window if sliding else 0,
        attention_heads=heads,
        kv_heads=kv_heads(config),
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        bytes_per_value=_BYTES_PER_VALUE[dtype],
        weights_bytes=weights,
        weights_sum=how,
    )


def _config_file(model: str) -> tuple[Path, str]:
    if model in presets():
        return PRESETS / f"{model}.json", model
    path = Path(model)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ModelError(
            f"There is no config.json at {model}: name a model's folder, its config.json, "
            f"or one of {', '.join(presets())}."
        )
    return file, file.resolve().parent.name


def _layers(config: Any, file: Path) -> tuple[int, int]:
    """How many layers attend to everything, and how many through a sliding window.

    Raises `ModelError` where nothing of the cache is compacted.
    """
    if getattr(config, "kv_lora_rank", None) is not None:
        raise ModelError(f"{file} describes multi-head latent attention, whose cache is not compacted: no plan for it.")
    window = getattr(config, "sliding_window", None)
    # As vLLM has it: a window without kinds of layers is every layer's, and without a window no layer slides.
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    unknown = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if unknown:
        raise ModelError(f"{file} has layers of type {unknown[0]}, whose memory this plan does not know.")
    sliding = kinds.count("sliding_attention") if window else 0
    if sliding == len(kinds):
        raise ModelError(
            f"Every layer of {file} sees a sliding window of {window:,} tokens, so nothing of its cache is compacted: "
            "no plan for it, serve it without compression."
        )
    return len(kinds) - sliding, sliding


def _bytes_on_disk(folder: Path) -> int:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        metadata = json.loads(index.read_text()).get("metadata") or {}
        if "total_size" in metadata:
            return int(metadata["total_size"])
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _weights(skeleton: Any, plain_bits: int, quantization: dict[str, Any] | None) -> tuple[int, str]:
    """Bytes of all parameters. Quantization leaves embeddings, the output head, norms and biases as they are."""
    every = dict(skeleton.named_parameters())
    total = sum(parameter.numel() for parameter in every.values())
    if quantization is None:
        return total * plain_bits // 8, f"{total / 1e9:.2f} G parameters × {plain_bits} bits"
    bits, untouched = _quantization(quantization)
    ends = {id(end.weight) for end in (skeleton.get_input_embeddings(), skeleton.get_output_embeddings()) if end}
    packed = sum(
        parameter.numel()
        for name, parameter in every.items()
        if parameter.ndim > 1 and id(parameter) not in ends and not _is_among(name.removesuffix(".weight"), untouched)
    )
    sums = f"{packed / 1e9:.2f} G parameters × {bits:.2f} bits + {(total - packed) / 1e9:.2f} G × {plain_bits} bits"
    return int(packed * bits + (total - packed) * plain_bits) // 8, sums


def _is_among(module: str, patterns: list[str]) -> bool:
    """Whether one of a quantization's patterns names the module, in the three ways that they are written.

    >>> _is_among("model.layers.3.self_attn.q_proj", ["lm_head", "model.layers.*.self_attn"])
    True
    """
    for pattern in patterns:
        if pattern.startswith("re:"):
            found = re.match(pattern.removeprefix("re:"), module) is not None
        elif "*" in pattern:
            found = fnmatch(module, f"*{pattern}*")
        else:
            found = pattern in module
        if found:
            return True
    return False


def _quantization(values: dict[str, Any]) -> tuple[float, list[str]]:
    """Bits per weight with its share of scales and zero points, and patterns of modules that are not quantized."""
    method = values.get("quant_method")
    untouched = next(
        (list(values[key]) for key in ("modules_to_not_convert", "ignored_layers", "ignore") if values.get(key)), []
    )
    try:
        bits = _bits(method, values)
    except (KeyError, StopIteration, TypeError):
        raise ModelError(
            f"The quantization {method} does not say how many bits a weight has and in groups of what size: "
            "give the size of the weights, --weights-gib."
        ) from None
    if bits is None:
        raise ModelError(f"The quantization {method} is not known here: give the size of the weights, --weights-gib.")
    return bits, untouched


def _bits(method: str | None, values: dict[str, Any]) -> float | None:
    """None for a method that is not known. Raises what a missing value raises."""
    if method in ("awq", "gptq"):
        bits = values["w_bit"] if "w_bit" in values else values["bits"]
        group = values["q_group_size"] if "q_group_size" in values else values["group_size"]
        return bits + ((_SCALE_BITS + bits) / group if group > 0 else 0)
    if method == "compressed-tensors":
        weights = next(iter(values["config_groups"].values()))["weights"]
        bits, group = weights["num_bits"], weights.get("group_size") or 0
        return bits + (_SCALE_BITS / group if group > 0 else 0)
    if method == "fp8":
        return 8.0
    if method == "mxfp4":
        return 4 + 8 / 32
    return None
