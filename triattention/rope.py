"""Rotary position embedding of a model as numbers: frequencies, scale, and how a head's numbers pair up.

Owns the reading of these from a transformers model (its own rotary module and its own
`apply_rotary_pos_emb`, both tried out, nothing looked up by architecture name) and the view of queries and
keys as complex bands. What is done with the bands is `scoring`'s and `calibration`'s business.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig

Style = Literal["neox", "gptj"]
Rotation = Callable[..., tuple[Tensor, Tensor]]

# Rotation is tried out at these positions; fp32 tables are good to about 1e-4 there.
_TRIAL_POSITIONS = (0, 1, 7, 100, 1000)
_TRIAL_TOLERANCE = 1e-3


@dataclass(frozen=True)
class RopeParameters:
    """How one attention head of a model is rotated: number pair f at position p turns by `inv_freq[f] * p`.

    `inv_freq`: radians per token of each rotated pair, as Python floats (fp64).
    `attention_scaling`: factor on the model's cos and sin tables (YaRN); queries and cached keys have it once
    each.
    `rotary_dim`: how many of the `head_dim` numbers are rotated, from the front.
    `style`: "neox" pairs number f with f + rotary_dim/2 (half split), "gptj" pairs 2f with 2f+1
    (interleaved).

    Partial rotary (`rotary_dim < head_dim`): the tail is not rotated, but it takes part in the attention
    product. Its numbers are paired likewise and become bands of frequency zero and scale one: the real part
    of a product of such bands is exactly the tail's dot product. So every head has `head_dim / 2` bands.
    """

    inv_freq: tuple[float, ...]
    attention_scaling: float
    rotary_dim: int
    head_dim: int
    style: Style

    def __post_init__(self) -> None:
        if self.rotary_dim != 2 * len(self.inv_freq):
            raise ValueError(
                f"rotary_dim is {self.rotary_dim} but there are {len(self.inv_freq)} frequencies: it must be twice that"
            )
        if self.rotary_dim > self.head_dim or self.head_dim % 2:
            raise ValueError(
                f"head_dim is {self.head_dim} with rotary_dim {self.rotary_dim}: head_dim must be even and "
                "at least rotary_dim"
            )
        if self.style not in ("neox", "gptj"):
            raise ValueError(f'RoPE style is "{self.style}": it must be "neox" or "gptj"')

    @property
    def bands(self) -> int:
        """Complex numbers per head: head_dim / 2, the unrotated tail included."""
        return self.head_dim // 2

    def frequencies(self) -> Tensor:
        """Radians per token of every band, fp64 [bands]; 0 in the tail."""
        frequencies = torch.zeros(self.bands, dtype=torch.float64)
        frequencies[: len(self.inv_freq)] = torch.tensor(self.inv_freq, dtype=torch.float64)
        return frequencies

    def scales(self) -> Tensor:
        """Factor that one rotation puts on every band, fp64 [bands]; 1 in the tail."""
        scales = torch.ones(self.bands, dtype=torch.float64)
        scales[: len(self.inv_freq)] = self.attention_scaling
        return scales

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Real and imaginary parts, each [..., bands], of heads [..., head_dim]; views if possible."""
        assert x.shape[-1] == self.head_dim, f"head_dim is {x.shape[-1]}, expected {self.head_dim}"
        if self.style == "gptj":
            return x[..., 0::2], x[..., 1::2]
        if self.rotary_dim == self.head_dim:
            return x[..., : self.bands], x[..., self.bands :]
        half, tail = self.rotary_dim // 2, (self.head_dim - self.rotary_dim) // 2
        a, b, c, d = x.split((half, half, tail, tail), dim=-1)
        return torch.cat((a, c), dim=-1), torch.cat((b, d), dim=-1)

    def as_complex(self, x: Tensor) -> Tensor:
        """Heads [..., head_dim] as complex bands [..., bands]: complex128 for fp64, else complex64."""
        real, imag = self.split(x if x.dtype == torch.float64 else x.float())
        return torch.complex(real.contiguous(), imag.contiguous())

    def as_heads(self, z: Tensor) -> Tensor:
        """Inverse of `as_complex`: complex bands [..., bands] as heads [..., head_dim]."""
        assert z.shape[-1] == self.bands, f"{z.shape[-1]} bands, expected {self.bands}"
        if self.style == "gptj":
            return torch.view_as_real(z).flatten(-2)
        rotated = self.rotary_dim // 2
        front, tail = z[..., :rotated], z[..., rotated:]
        return torch.cat((front.real, front.imag, tail.real, tail.imag), dim=-1)

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Heads [..., tokens, head_dim] rotated to `positions` [tokens], as the model does it but in fp64."""
        phases = positions.double()[:, None] * self.frequencies().to(x.device)
        turned = self.as_complex(x.double()) * torch.polar(self.scales().to(x.device).expand_as(phases), phases)
        return self.as_heads(turned)

    def plain(self) -> dict[str, Any]:
        """The parameters as JSON values; `from_plain` reads them back exactly."""
        return {
            "inv_freq": list(self.inv_freq),
            "attention_scaling": self.attention_scaling,
            "rotary_dim": self.rotary_dim,
            "head_dim": self.head_dim,
            "style": self.style,
        }

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> "RopeParameters":
        return cls(
            inv_freq=tuple(float(f) for f in plain["inv_freq"]),
            attention_scaling=float(plain["attention_scaling"]),
            rotary_dim=int(plain["rotary_dim"]),
            head_dim=int(plain["head_dim"]),
            style=plain["style"],
        )

    def difference(self, other: "RopeParameters") -> str | None:
        """What differs, as a clause for an error message, or None.

        Frequencies count as equal to 1e-5: models compute them in fp32, and not bit for bit alike on every
        processor.
        """
        for name in ("style", "rotary_dim", "head_dim"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                return f"RoPE {name} {mine} against {theirs}"
        if abs(self.attention_scaling - other.attention_scaling) > 1e-5 * abs(other.attention_scaling):
            return f"RoPE attention_scaling {self.attention_scaling} against {other.attention_scaling}"
        for band, (a, b) in enumerate(zip(self.inv_freq, other.inv_freq, strict=True)):
            if abs(a - b) > 1e-5 * abs(b):
                return f"RoPE frequency of band {band} {a:.6g} against {b:.6g}"
        return None

    @classmethod
    def from_config(cls, config: PreTrainedConfig) -> "RopeParameters":
        """Reads the parameters from the model that transformers builds for `config` (no weights are made).

        ValueError, one sentence: the rotation is not one fixed table for all layers, or cannot be found.
        """
        config = config.get_text_config()
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise ValueError(
                f'transformers has no causal language model for model_type "{config.model_type}", so its '
                "RoPE cannot be read: use a model that transformers supports without remote code"
            )
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        module, rotation = find_rotary(model), getattr(find_rotation_module(model), ROTATION)
        # The meta model has no numbers: build its rotary module, alone, once more on the CPU.
        with torch.device("cpu"):
            rotary = type(module)(config)
        return _measure(rotary, rotation, head_dim(config))


ROTATION = "apply_rotary_pos_emb"


def read_config(
    model: str | Path, overrides: dict[str, Any] | Callable[[PreTrainedConfig], PreTrainedConfig] | None = None
) -> PreTrainedConfig:
    """The config of a model's folder, or of an id that transformers can find. ValueError, one sentence, without one.

    `overrides`: vLLM's `hf_overrides`.
    """
    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"model is {model}, but no config that transformers knows can be read there: name a folder as transformers "
            f"saves it, or the id of a model that can be fetched ({reason})"
        ) from error
    if callable(overrides):
        return overrides(config)
    _override(config, overrides or {})
    return config


def _override(config: PreTrainedConfig, overrides: dict[str, Any]) -> None:
    """As vLLM does it: inner configs are changed, everything else is replaced."""
    for name, value in overrides.items():
        inner = getattr(config, name, None)
        if isinstance(inner, PreTrainedConfig) and isinstance(value, dict):
            _override(inner, value)
        else:
            setattr(config, name, value)


def head_dim(config: PreTrainedConfig) -> int:
    """Numbers per attention head, as transformers' models have it: `head_dim` where the config sets it."""
    explicit = getattr(config, "head_dim", None)
    return int(explicit if explicit is not None else config.hidden_size // config.num_attention_heads)


def find_rotary(model: nn.Module) -> nn.Module:
    """The one rotary embedding module of a model. ValueError when there is none or the table is not fixed."""
    name = type(model).__name__
    found = {type(m): m for n, m in model.named_modules() if n.rsplit(".", 1)[-1] == "rotary_emb"}
    if len(found) != 1:
        raise ValueError(
            f"{name} has {len(found)} kinds of rotary embedding and TriAttention needs exactly one: "
            "use a model with standard RoPE"
        )
    rotary = next(iter(found.values()))
    rope_type = getattr(rotary, "rope_type", None)
    if not isinstance(rope_type, str):
        raise ValueError(f"{name} rotates its layers by different tables: TriAttention needs one table for all layers")
    if rope_type in ("dynamic", "longrope"):
        raise ValueError(
            f'{name} has rope_type "{rope_type}", whose frequencies change with the length of the sequence: '
            "set a fixed one (yarn, llama3, linear, default) in the model's config"
        )
    return rotary


def find_rotation_module(model: nn.Module) -> ModuleType:
    """The Python module whose `apply_rotary_pos_emb(q, k, cos, sin, ...)` the attention layers call."""
    modules = {
        inspect.getmodule(inspect.unwrap(type(m).forward))
        for m in model.modules()
        if isinstance(getattr(m, "layer_idx", None), int)
    }
    usable = [m for m in modules if m is not None and _takes_query_and_key(getattr(m, ROTATION, None))]
    if len(usable) != 1:
        raise ValueError(
            f"{type(model).__name__} does not rotate its queries by {ROTATION}(q, k, cos, sin) of its own "
            "modeling file, so they cannot be read: use a model whose transformers code does, as Llama's does"
        )
    return usable[0]


def _takes_query_and_key(function: object) -> bool:
    return callable(function) and list(inspect.signature(function).parameters)[:4] == ["q", "k", "cos", "sin"]


@torch.no_grad()
def _measure(rotary: nn.Module, rotation: Rotation, head_dim: int) -> RopeParameters:
    """The parameters that explain what the model's own rotation does to numbers; ValueError if none do."""
    inv_freq = rotary.inv_freq
    scaling = rotary.attention_scaling
    assert isinstance(inv_freq, Tensor)
    assert isinstance(scaling, int | float)
    rotary_dim = 2 * inv_freq.numel()

    # A quarter turn sends number 0 to its partner: 1 if interleaved, the start of the second half otherwise.
    first = torch.zeros(1, 1, 1, rotary_dim)
    first[..., 0] = 1
    cos, sin = rotary(first, torch.zeros(1, 1, dtype=torch.long))
    quarter, _ = rotation(first, first, torch.zeros_like(cos), torch.ones_like(sin))
    partner = int(quarter.abs().argmax())
    parameters = RopeParameters(
        inv_freq=tuple(inv_freq.double().tolist()),
        attention_scaling=float(scaling),
        rotary_dim=rotary_dim,
        head_dim=head_dim,
        style="gptj" if partner == 1 and rotary_dim > 2 else "neox",
    )

    positions = torch.tensor(_TRIAL_POSITIONS)
    heads = torch.zeros(1, 1, len(positions), head_dim)
    heads[..., :rotary_dim] = torch.linspace(-1, 1, rotary_dim)
    cos, sin = rotary(heads, positions[None])
    turned, _ = rotation(heads[..., :rotary_dim], heads[..., :rotary_dim], cos, sin)
    if not torch.allclose(
        turned.double(), parameters.rotate(heads, positions)[..., :rotary_dim], atol=_TRIAL_TOLERANCE
    ):
        raise ValueError(
            f"{type(rotary).__name__} does not rotate number pairs by position times frequency as RoPE does: "
            "use a model with standard RoPE"
        )
    return parameters
