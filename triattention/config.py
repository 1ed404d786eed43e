"""The one set of settings that decides what is kept and when. Owns their validation; everything else reads it."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Selection = Literal["per_head", "per_layer_per_head"]


class CompressionConfig(BaseModel):
    """Compression settings of one engine; `additional_config["triattention"]` of vLLM holds them as a dict.

    All sizes are in tokens. Raises `pydantic.ValidationError` with one sentence per wrong setting.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    budget: int = Field(2048, ge=32, description="tokens kept per KV head after a compaction, pinned prompt aside")
    interval: int = Field(128, ge=1, description="tokens that a request decodes between two compactions")
    window: int = Field(128, ge=0, description="most recent tokens that are always kept")
    prompt: Literal["pin", "compress"] = Field(
        "pin", description="pin: prompt blocks are never compacted; compress: they are, at chunk boundaries"
    )
    sinks: int = Field(
        0, ge=0, description="first tokens of the sequence that are never evicted, also with prompt: compress"
    )
    selection: Selection = Field(
        "per_layer_per_head",
        description="per_layer_per_head: every layer keeps its own set; per_head: a head's is shared by all layers",
    )
    segments: int = Field(
        1,
        ge=1,
        description="a head's evictable tokens, in order of position, are cut into so many runs that lose equally "
        "many; 1: the lowest scores go, wherever they stand",
    )
    reserve_growth: bool = Field(
        True,
        description="admit a request only if every running one can still grow to its bound: no preemption",
    )
    policy: str = Field("triattention", description="name of a registered scoring policy")
    statistics: Path | Literal["self"] | None = Field(
        None,
        description="calibrated query statistics (safetensors) of the model; self: the engine calibrates itself at "
        "start, from a text that ships, and keeps the result in vLLM's cache folder",
    )
    max_offset: int = Field(
        65536,
        ge=1,
        description="policy triattention averages over queries 1, 2, 4, ... up to so many tokens ahead; a power of two",
    )
    seed: int = Field(0, ge=0, lt=1 << 63, description="policy random draws from it")

    def pinned_tokens(self, prompt_tokens: int) -> int:
        """Tokens at the start of a sequence that are never compacted; the block in which they end is not either."""
        return max(self.sinks, prompt_tokens if self.prompt == "pin" else 0)

    @field_validator("max_offset")
    @classmethod
    def _power_of_two(cls, value: int) -> int:
        if value & (value - 1):
            raise ValueError(
                f"max_offset is {value}: offsets are powers of two, so set it to one, such as "
                f"{1 << (value.bit_length() - 1)}"
            )
        return value

    @model_validator(mode="after")
    def _check(self) -> "CompressionConfig":
        if self.window >= self.budget:
            raise ValueError(
                f"window is {self.window} but budget is {self.budget}: the recent window is part of the budget, "
                "so set window below budget"
            )
        if self.policy == "triattention" and self.statistics is None:
            raise ValueError(
                'policy is "triattention" but statistics is not set: name the file that `trifleet calibrate` wrote '
                "for this model, or self, or choose a policy that needs none"
            )
        return self
