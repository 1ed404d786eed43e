"""What a scoring policy is, what it is told about its model, and the list of policies by name."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import TypeVar

import torch
from transformers import PreTrainedConfig

from triattention.config import CompressionConfig
from triattention.kernels.vocabulary import QueryWeights
from triattention.rope import RopeParameters

ENTRY_POINTS = "triattention.policies"


@dataclass(frozen=True)
class PolicyContext:
    """The part of the model whose keys this process holds (one tensor-parallel rank).

    `layers`: model layer index of each layer in `keys`, in order.
    `kv_heads`: global indices of the KV heads in `keys`; all of them are `range(total_kv_heads)`.
    `q_heads`, `total_kv_heads`: of the whole model; query head h reads KV head
    `h // (q_heads // total_kv_heads)`.
    """

    layers: tuple[int, ...]
    kv_heads: range
    total_kv_heads: int
    q_heads: int
    head_dim: int
    rope: RopeParameters
    model_config: PreTrainedConfig

    def __post_init__(self) -> None:
        if self.q_heads % self.total_kv_heads:
            raise ValueError(
                f"q_heads is {self.q_heads} and total_kv_heads is {self.total_kv_heads}: query heads must "
                "divide evenly among the KV heads"
            )
        if not self.kv_heads or not 0 <= self.kv_heads[0] <= self.kv_heads[-1] < self.total_kv_heads:
            raise ValueError(f"kv_heads is {self.kv_heads}: it must name some of the {self.total_kv_heads} KV heads")


class Policy(ABC):
    """Says which cached tokens are worth keeping.

    The scores of a KV head are compared over its tokens only, but selection `per_head` averages them over
    layers: a policy returns scores of one scale for all layers (`triattention.scoring.standardise` makes them
    so).
    """

    @abstractmethod
    def score(self, keys: torch.Tensor, position: int) -> torch.Tensor:
        """Scores of cached tokens, fp32 [layers, kv_heads, tokens]; higher means keep.

        `keys`: [layers, kv_heads, tokens, head_dim], any float dtype, rotated, as they lie in the cache.
        After earlier compactions slot order is not position order.
        `position`: tokens processed so far, that is the position of the next query.
        """

    def query_weights(self, device: torch.device) -> QueryWeights | None:
        """For a policy whose `score` is that of `triattention.kernels.score`: its weights, on the keys' device.

        The engine then scores keys where they lie in the cache. None, the default: it gathers them and asks `score`.
        """
        return None


Factory = Callable[[CompressionConfig, PolicyContext], Policy]
AnyFactory = TypeVar("AnyFactory", bound=Factory)

_factories: dict[str, Factory] = {}


def register(name: str) -> Callable[[AnyFactory], AnyFactory]:
    """Makes a policy known as `policy: <name>`: decorates a Policy class, or a function, of (config,
    context).

        @register("newest_norm")
        class NewestNorm(Policy):
            def __init__(self, config: CompressionConfig, context: PolicyContext) -> None: ...

    Engines run in processes of their own. So that they find a policy of another package, that package names
    it in its metadata: entry point group `triattention.policies`, entry `newest_norm = "package.module"`.
    """

    def add(factory: AnyFactory) -> AnyFactory:
        if name in _factories:
            raise ValueError(f'policy "{name}" is already registered by {_factories[name]}: choose another name')
        _factories[name] = factory
        return factory

    return add


def policy_names() -> list[str]:
    """Names that `policy` may have, those of other packages included."""
    return sorted(_factories.keys() | {e.name for e in entry_points(group=ENTRY_POINTS)})


def create_policy(config: CompressionConfig, context: PolicyContext) -> Policy:
    """The policy that `config.policy` names. ValueError for an unknown name or statistics that do not fit."""
    if config.policy not in _factories:
        for entry in entry_points(group=ENTRY_POINTS, name=config.policy):
            entry.load()
    if config.policy not in _factories:
        raise ValueError(
            f'policy is "{config.policy}", which is not registered: use one of {", ".join(policy_names())}'
        )
    return _factories[config.policy](config, context)
