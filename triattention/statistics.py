"""Calibrated query statistics of a model: what they hold, their file, and the check that they fit the model.

`triattention.calibration` makes them, `triattention.scoring` uses them. The file is safetensors with one JSON
text under the metadata key "triattention"; nothing in it is unpickled.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import FalconConfig, PreTrainedConfig

from triattention.rope import RopeParameters, head_dim

FORMAT = 1
_HEADER = "triattention"
_RECALIBRATE = "run `trifleet calibrate` for this model"


class _Rope(BaseModel):
    """`RopeParameters.plain`."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    inv_freq: list[float]
    attention_scaling: float
    rotary_dim: int
    head_dim: int
    style: str


class _Header(BaseModel):
    """The JSON text in the file."""

    model_config = ConfigDict(strict=True, extra="forbid")

    format: int
    model_id: str
    facts: dict[str, int | str]
    config_digest: str
    rope: _Rope
    layers: list[int]
    tokens: int


def model_facts(config: PreTrainedConfig) -> dict[str, Any]:
    """What a config says about the model's queries; statistics fit a model that agrees in all of it."""
    config = config.get_text_config()
    return {
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": kv_heads(config),
        "head_dim": head_dim(config),
    }


def kv_heads(config: PreTrainedConfig) -> int:
    """Of a layer. Falcon has names of its own; models older than groups have none, and one for every query head."""
    if isinstance(config, FalconConfig):
        return 1 if config.multi_query and not config.new_decoder_architecture else int(config.num_kv_heads)
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


@dataclass(frozen=True)
class QueryStatistics:
    """Mean and mean magnitude of every query head's complex bands, after the query norm and before RoPE.

    `query_mean`: E[q_f], complex64 [layers, q_heads, bands]. `query_magnitude`: E|q_f|, fp32, same shape.
    `layers`: model layer index of each row. `tokens`: how many tokens the means are over; 0 where
    that was not recorded.
    `facts`: `model_facts` of the calibrated model's config. `model_id`: its name, for people only.
    """

    model_id: str
    facts: dict[str, Any]
    rope: RopeParameters
    layers: tuple[int, ...]
    tokens: int
    query_mean: Tensor
    query_magnitude: Tensor

    @property
    def q_heads(self) -> int:
        return int(self.facts["num_attention_heads"])

    @property
    def kv_heads(self) -> int:
        return int(self.facts["num_key_value_heads"])

    @property
    def config_digest(self) -> str:
        """SHA-256 of the facts, as hex."""
        return hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()

    def save(self, path: Path) -> None:
        """Writes the file whole or not at all; its folder is made."""
        header = {
            "format": FORMAT,
            "model_id": self.model_id,
            "facts": self.facts,
            "config_digest": self.config_digest,
            "rope": self.rope.plain(),
            "layers": list(self.layers),
            "tokens": self.tokens,
        }
        tensors = {
            "query_mean": torch.view_as_real(self.query_mean).contiguous(),
            "query_magnitude": self.query_magnitude.contiguous(),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".part")
        # Not `save_file`, which keeps everybody else from reading it.
        temporary.write_bytes(save(tensors, {_HEADER: json.dumps(header)}))
        temporary.replace(path)

    @classmethod
    def load(cls, path: Path, model_config: PreTrainedConfig, layers: Sequence[int] | None = None) -> "QueryStatistics":
        """Reads statistics and checks that they are whole and fit the model.

        `layers`: model layers that must be among them; None means every layer of the model.
        Raises ValueError with one sentence that names what is wrong and the remedy.
        """
        statistics = cls._read(path)
        statistics._check_fit(path, model_config, layers)
        statistics._check_whole(path)
        return statistics

    @classmethod
    def _read(cls, path: Path) -> "QueryStatistics":
        if not path.is_file():
            raise ValueError(f"statistics file {path} does not exist: {_RECALIBRATE}, or correct the path")
        try:
            with safe_open(path, framework="pt") as file:
                plain = dict(json.loads(file.metadata()[_HEADER]))
                mean = torch.view_as_complex(file.get_tensor("query_mean"))
                magnitude = file.get_tensor("query_magnitude")
            if plain.get("format", FORMAT) == FORMAT:
                header = _Header.model_validate(plain)
                rope = RopeParameters.from_plain(header.rope.model_dump())
        except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{path} is not a file of query statistics ({reason}): {_RECALIBRATE}") from error
        if plain.get("format", FORMAT) != FORMAT:
            raise ValueError(
                f"statistics {path} have format {plain['format']} but this version reads "
                f"format {FORMAT}: {_RECALIBRATE}"
            )
        statistics = cls(
            model_id=header.model_id,
            facts=dict(header.facts),
            rope=rope,
            layers=tuple(header.layers),
            tokens=header.tokens,
            query_mean=mean,
            query_magnitude=magnitude,
        )
        if statistics.config_digest != header.config_digest:
            raise ValueError(f"statistics {path} have a header that was altered: {_RECALIBRATE}")
        return statistics

    def _check_whole(self, path: Path) -> None:
        shape = (len(self.layers), self.q_heads, self.rope.bands)
        for name in ("query_mean", "query_magnitude"):
            tensor = getattr(self, name)
            if tuple(tensor.shape) != shape:
                raise ValueError(
                    f"statistics {path} hold {name} of shape {tuple(tensor.shape)} but their header says "
                    f"{shape}: {_RECALIBRATE}"
                )
            dtype = torch.complex64 if name == "query_mean" else torch.float32
            if tensor.dtype != dtype:
                raise ValueError(f"statistics {path} hold {name} as {tensor.dtype}, not {dtype}: {_RECALIBRATE}")
            broken = ~tensor.isfinite().flatten(1).all(dim=1)
            if broken.any():
                layer = self.layers[int(broken.nonzero()[0])]
                raise ValueError(f"statistics {path} hold a NaN or infinity in {name} of layer {layer}: {_RECALIBRATE}")
        if (self.query_magnitude < 0).any():
            raise ValueError(f"statistics {path} hold a negative query_magnitude: {_RECALIBRATE}")

    def _check_fit(self, path: Path, model_config: PreTrainedConfig, layers: Sequence[int] | None) -> None:
        ours = model_facts(model_config)
        for name, value in ours.items():
            if self.facts.get(name) != value:
                raise ValueError(
                    f"statistics {path} were made for {self.model_id} with {name} {self.facts.get(name)} but "
                    f"this model has {value}: {_RECALIBRATE}"
                )
        difference = self.rope.difference(RopeParameters.from_config(model_config))
        if difference is not None:
            raise ValueError(
                f"statistics {path} were made for {self.model_id} with {difference} of this model: {_RECALIBRATE}"
            )
        needed = range(ours["num_hidden_layers"]) if layers is None else layers
        missing = [layer for layer in needed if layer not in self.layers]
        if missing:
            raise ValueError(f"statistics {path} lack layers {missing} of this model: {_RECALIBRATE}")
