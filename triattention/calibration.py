"""Calibration: runs a model over text and averages its queries, after the query norm and before RoPE.

Owns the capture and the running sums. `triattention.statistics` owns what comes out of it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from triattention.rope import ROTATION, RopeParameters, find_rotation_module, read_config
from triattention.statistics import QueryStatistics, model_facts

Capture = Callable[[int, Tensor, Tensor], None]
"""Called with layer index, queries before RoPE and queries after it, both [1, q_heads, tokens, head_dim]."""

_CHUNK_TOKENS = 4096

# Text files are tokenised in pieces of whole lines of about this many characters.
_PIECE_CHARACTERS = 1 << 16

SHIPPED_TEXT = Path(__file__).parent / "text" / "reasoning.txt"
"""Worked problems, code, dialogue and prose, about 3,000 tokens: what is used where nobody brings a text."""


def check_out(out: Path, model: str | Path) -> None:
    """Raises ValueError where statistics would be taken for weights of the model, or take the place of a device."""
    if out.exists() and not out.is_file():
        raise ValueError(f"out is {out}, which is no ordinary file, and would be replaced by one: name another")
    if out.resolve().parent == Path(model).resolve():
        raise ValueError(
            f"out is {out}, inside the model's folder, where vLLM would load it as weights: write it somewhere else"
        )


def calibrate(
    model: str | Path,
    text: Iterable[str] | Path,
    out: Path | None,
    chunk_tokens: int | None = None,
    max_tokens: int = 500_000,
    on_progress: Callable[[int, int], None] | None = None,
    device: str = "cpu",
    config: PreTrainedConfig | None = None,
) -> QueryStatistics:
    """Query statistics of a local causal language model over `text`; written to `out` if that is set.

    `model`: folder of config, safetensors and tokenizer as transformers saves them, or an id that transformers can
    find; its code is never loaded.
    `text`: documents as the model would see them (chat template applied), or one text file. A document is run
    in chunks of `chunk_tokens` (None: 4,096, or the model's context where that is less), each from position 0 and with
    the tokenizer's BOS before it if it has one; all ends when `max_tokens` tokens were seen. Use text like the traffic.
    `on_progress(tokens so far, tokens in all)` is called after every chunk; at the end with both equal. A text that
    can be read only once counts as endless until its end.
    `config`: of the model, where it is not served with the one that it comes with.

    Memory: the model, one chunk's activations, and fp64 sums of [layers, q_heads, bands].
    Raises ValueError in one sentence where the model cannot be loaded or its queries cannot be captured, or there is no
    text; `torch.OutOfMemoryError` where a device has too little memory.
    """
    if isinstance(text, str):
        raise ValueError("text is a single string: pass a list of documents, or a Path to a text file")
    if chunk_tokens is not None and chunk_tokens < 2:
        raise ValueError(f"chunk_tokens is {chunk_tokens}: a chunk needs room for BOS and text, set 2 or more")
    if isinstance(text, Path) and not text.is_file():
        raise ValueError(f"there is no text file {text}: correct the path")
    if out is not None:
        check_out(out, model)
    _check_device(device)
    config = config or read_config(model)
    rope = RopeParameters.from_config(config)
    chunk_tokens = _chunk_tokens(chunk_tokens, config)
    network, tokenizer = _load(model, config)
    network = network.to(device).eval()

    facts = model_facts(config)
    sums = _Sums(rope, facts["num_attention_heads"])
    total = max_tokens
    if isinstance(text, Path | Sequence):
        total = sum(len(chunk) for chunk in _chunks(tokenizer, text, chunk_tokens, max_tokens))
    seen = 0
    with torch.inference_mode(), captured_queries(network, sums.add):
        for chunk in _chunks(tokenizer, text, chunk_tokens, max_tokens):
            # The base model stops at the last hidden state: no logits of [tokens, vocabulary].
            network.base_model(input_ids=torch.tensor([chunk], device=device), use_cache=False)
            seen += len(chunk)
            if on_progress is not None:
                on_progress(seen, total)
    if seen == 0:
        raise ValueError("the calibration text gave no tokens: pass some text like the model's traffic")
    if on_progress is not None:
        on_progress(seen, seen)

    layers, mean, magnitude = sums.means()
    statistics = QueryStatistics(
        model_id=Path(model).resolve().name,
        facts=facts,
        rope=rope,
        layers=layers,
        tokens=seen,
        query_mean=mean,
        query_magnitude=magnitude,
    )
    if out is not None:
        statistics.save(out)
    return statistics


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(
            f"device is {device}, which torch cannot use here ({_first_line(error)}): set cpu, or the name of a device "
            "that this machine and this build of torch have"
        ) from error


def _chunk_tokens(asked: int | None, config: PreTrainedConfig) -> int:
    """At positions beyond the model's context its queries are not those that it has in service."""
    context = config.get_text_config().max_position_embeddings
    if asked is not None and asked > context:
        raise ValueError(
            f"chunk_tokens is {asked}, but the model's context is {context} tokens (max_position_embeddings): "
            f"set at most {context}"
        )
    return asked or min(_CHUNK_TOKENS, context)


def _load(model: str | Path, config: PreTrainedConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    try:
        network = AutoModelForCausalLM.from_pretrained(model, config=config, dtype="auto", use_safetensors=True)
        return network, AutoTokenizer.from_pretrained(model)
    except torch.OutOfMemoryError:
        raise
    except (ImportError, OSError, RuntimeError, SafetensorError, ValueError) as error:
        remedy = "name the folder of a model as transformers saves it, with safetensors and tokenizer"
        if isinstance(error, ImportError):  # transformers' way to ask for the package of a quantization
            remedy = "calibrate the model that it was quantized from, whose statistics fit it"
        reason = _first_line(error)
        raise ValueError(f"model is {model}, but transformers cannot load it ({reason}): {remedy}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


@contextmanager
def captured_queries(model: nn.Module, capture: Capture) -> Iterator[None]:
    """While open, `capture` gets the queries of every attention layer that the model runs.

    transformers' attention layers call `apply_rotary_pos_emb` of their modeling file with the queries as RoPE
    needs them, so after any query norm: it is wrapped there. A hook on each module that knows its layer index
    says which layer is calling. Not for two models of one architecture at a time.
    """
    code = find_rotation_module(model)
    rotation = getattr(code, ROTATION)
    layer = -1

    def enter(module: nn.Module, _args: object) -> None:
        nonlocal layer
        assert isinstance(module.layer_idx, int)
        layer = module.layer_idx

    def wrapped(q: Tensor, k: Tensor, *args: Tensor, **kwargs: int) -> tuple[Tensor, Tensor]:
        rotated: tuple[Tensor, Tensor] = rotation(q, k, *args, **kwargs)
        capture(layer, q, rotated[0])
        return rotated

    numbered = [m for m in model.modules() if isinstance(getattr(m, "layer_idx", None), int)]
    hooks = [m.register_forward_pre_hook(enter) for m in numbered]
    setattr(code, ROTATION, wrapped)
    try:
        yield
    finally:
        setattr(code, ROTATION, rotation)
        for hook in hooks:
            hook.remove()


class _Sums:
    """Running fp64 sums of q and |q| per layer, query head and band."""

    def __init__(self, rope: RopeParameters, q_heads: int) -> None:
        self.rope = rope
        self.q_heads = q_heads
        self.tokens: dict[int, int] = {}
        self.query: dict[int, Tensor] = {}
        self.magnitude: dict[int, Tensor] = {}

    def add(self, layer: int, queries: Tensor, rotated: Tensor) -> None:
        if queries.dim() != 4 or queries.shape[1] != self.q_heads or queries.shape[3] != self.rope.head_dim:
            raise ValueError(
                f"queries of layer {layer} have shape {tuple(queries.shape)} before RoPE, not [1, "
                f"{self.q_heads}, tokens, {self.rope.head_dim}]: this architecture cannot be calibrated"
            )
        if layer not in self.tokens:
            self._check_rotation(layer, queries, rotated)
            self.tokens[layer] = 0
            self.query[layer] = torch.zeros(self.q_heads, self.rope.bands, dtype=torch.complex128)
            self.magnitude[layer] = torch.zeros(self.q_heads, self.rope.bands, dtype=torch.float64)
        bands = self.rope.as_complex(queries[0])
        self.tokens[layer] += bands.shape[1]
        self.query[layer] += bands.sum(dim=1, dtype=torch.complex128).cpu()
        self.magnitude[layer] += bands.abs().sum(dim=1, dtype=torch.float64).cpu()

    def _check_rotation(self, layer: int, queries: Tensor, rotated: Tensor) -> None:
        """The layer must rotate by the table that scoring will use; in some models layers have their own."""
        first = queries[:, :, :64]
        expected = self.rope.rotate(first, torch.arange(first.shape[2], device=first.device))
        error = (rotated[:, :, :64].double() - expected).abs().max() / expected.abs().max()
        if error > 4 * torch.finfo(torch.bfloat16).eps:
            raise ValueError(
                f"layer {layer} rotates its queries by another table than the model's RoPE parameters say: "
                "this architecture cannot be calibrated"
            )

    def means(self) -> tuple[tuple[int, ...], Tensor, Tensor]:
        """Layers in order, E[q] complex64 and E|q| fp32, both [layers, q_heads, bands]."""
        layers = tuple(sorted(self.tokens))
        mean = torch.stack([self.query[layer] / self.tokens[layer] for layer in layers])
        magnitude = torch.stack([self.magnitude[layer] / self.tokens[layer] for layer in layers])
        return layers, mean.to(torch.complex64), magnitude.float()


def _chunks(
    tokenizer: PreTrainedTokenizerBase, text: Iterable[str] | Path, chunk_tokens: int, max_tokens: int
) -> Iterator[list[int]]:
    """Token ids of the text, at most `chunk_tokens` at a time and `max_tokens` in all, BOS included."""
    bos = [tokenizer.bos_token_id] if tokenizer.bos_token_id in tokenizer("").input_ids else []
    documents = [_pieces(text)] if isinstance(text, Path) else ([document] for document in text)
    left = max_tokens
    for document in documents:
        pending: list[int] = []
        for piece in document:
            pending += tokenizer(piece, add_special_tokens=False).input_ids
            while len(pending) >= chunk_tokens and left > 0:
                chunk, pending = _cut(pending, bos, min(chunk_tokens, left))
                left -= len(chunk)
                yield chunk
            if left <= 0:
                return
        while pending and left > 0:
            chunk, pending = _cut(pending, bos, min(chunk_tokens, left))
            left -= len(chunk)
            yield chunk


def _cut(tokens: list[int], bos: list[int], size: int) -> tuple[list[int], list[int]]:
    """The next chunk of at most `size` tokens, beginning with `bos`, and the tokens that are left."""
    prefix = [] if tokens[: len(bos)] == bos else bos
    taken = size - len(prefix)
    return prefix + tokens[:taken], tokens[taken:]


def _pieces(path: Path) -> Iterator[str]:
    """The file's text in pieces that end at line ends."""
    with path.open(encoding="utf-8") as file:
        while lines := file.readlines(_PIECE_CHARACTERS):
            yield "".join(lines)
