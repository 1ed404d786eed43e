"""The models that engines are measured with: the bundled one, and one whose proportions are those of a deployment.

`DEPLOYMENT` stands for Qwen3-8B on a 40 GB card, the load of `bench engine` for one of the paper's: requests of 16,000
output tokens with a budget of 2,048. There 16.4 GB of weights share the card with 19.3 GB of KV memory, 131,072 tokens
of 144 KiB. The benchmark takes an eighth of all tokens (2,000, 256, 16,384), so one token must weigh eight times as
much beside the weights: that is what the sizes below do, in a model small enough for one thread. Its weights are
random. What a step costs does not depend on them, and no answer is judged.

What no size mends: a CPU core is bound by arithmetic at batches where a GPU still waits for the weights, and reads them
as fast for one request as for many. So a full batch gains less here than it would there.
"""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import bundled

Name = Literal["deployment", "bundled"]
NAMES: tuple[Name, ...] = ("deployment", "bundled")

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
CALIBRATION_TOKENS = 2000


@dataclass(frozen=True)
class Model:
    path: Path
    statistics: Path


BUNDLED = Model(bundled.MODEL, bundled.STATISTICS)

QWEN3_8B = {"weight_bytes": 16.4e9, "kv_bytes_per_token": 36 * 2 * 8 * 128 * 2}
TOKENS_STAND_FOR = 8
"""Tokens of the deployment that one token of the benchmark stands for."""

DEPLOYMENT = {
    "hidden_size": 512,
    "intermediate_size": 1472,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
"""14.3 million parameters of bfloat16, 2 KiB of KV a token; a group of four query heads to a KV head, as Qwen3-8B."""


@contextmanager
def model(name: Name) -> Iterator[Model]:
    """A model's folder and query statistics; the deployment's are made anew and last as long as this is open."""
    if name == "bundled":
        yield BUNDLED
        return
    with tempfile.TemporaryDirectory(prefix="trifleet-bench-") as folder:
        yield _deployment(Path(folder))


def _deployment(folder: Path) -> Model:
    import torch
    from transformers import AutoConfig, Qwen3ForCausalLM

    from bundled.calibration import calibration_text
    from triattention.calibration import calibrate

    model, statistics = folder / "model", folder / "statistics.safetensors"
    config = AutoConfig.from_pretrained(bundled.MODEL)  # its vocabulary, RoPE and length
    config.update(DEPLOYMENT | {"layer_types": ["full_attention"] * DEPLOYMENT["num_hidden_layers"]})
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(model)
    for file in TOKENIZER_FILES:
        shutil.copy(bundled.MODEL / file, model / file)
    calibrate(model, islice(calibration_text(), 4), statistics, max_tokens=CALIBRATION_TOKENS)
    return Model(model, statistics)
