"""An independent reference: transformers in fp32 with a dense KV cache, the same evictions applied as masks.

Shares with the engine only its settings and the statistics file's numbers. Nothing is moved or freed here: every
key stays at its position, and a bool per (layer, KV head, token) says which are visible. Scores follow the paper's
definition: 17 offsets summed one by one in fp64 over un-rotated keys and explicit distances.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from triattention.config import CompressionConfig

TIE = 2e-6
"""Scores closer than this are told apart by rounding, which is another one on every kind of CPU."""


class DenseReference:
    def __init__(
        self, model: Path, statistics: Path, stored: Callable[[torch.Tensor], torch.Tensor] = lambda numbers: numbers
    ) -> None:
        """`stored`: what reading gives of a key or value written to the cache, where that is not the same."""
        self.stored = stored
        self.visible: list[torch.Tensor] | None = None
        ALL_ATTENTION_FUNCTIONS.register("visible_only", self._attention)
        self.model = AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.float32, attn_implementation="visible_only"
        )
        config = self.model.config
        self.kv_heads = config.num_key_value_heads
        self.group = config.num_attention_heads // self.kv_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        rotary = self.model.base_model.rotary_emb
        self.frequencies = rotary.inv_freq.double()
        self.scaling = rotary.attention_scaling
        types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
        self.compacted_layers = [i for i, kind in enumerate(types) if kind == "full_attention"]
        numbers = load_file(statistics)
        self.query_mean = torch.view_as_complex(numbers["query_mean"].double())  # [layers, q_heads, bands]
        self.query_magnitude = numbers["query_magnitude"].double()

    def _attention(
        self, module, query, key, value, attention_mask, scaling, sliding_window=None, softcap=None, s_aux=None, **_
    ):  # type: ignore[no-untyped-def]
        queries, tokens = query.shape[2], key.shape[2]
        key, value = self.stored(key), self.stored(value)
        distance = torch.arange(tokens - queries, tokens)[:, None] - torch.arange(tokens)
        mask = ((distance >= 0) & (distance < (sliding_window or tokens + 1))).expand(self.kv_heads, -1, -1)
        if self.visible is not None:
            mask = mask & self.visible[module.layer_idx][:, None, :tokens]
        key, value, mask = (x.repeat_interleave(self.group, dim=-3) for x in (key, value, mask))
        logits = query @ key.transpose(-1, -2) * scaling
        if softcap is not None:
            logits = (logits / softcap).tanh() * softcap
        logits = logits.masked_fill(~mask, -torch.inf)
        if s_aux is not None:  # a sink per head takes its share of the softmax and has no value
            logits = torch.cat((logits, s_aux[None, :, None, None].expand(*logits.shape[:3], 1)), dim=-1)
        weights = logits.softmax(-1)[..., :tokens]
        return (weights @ value).transpose(1, 2).contiguous(), None

    def scores(
        self, rotated: torch.Tensor, positions: torch.Tensor, layer: int, now: int, max_offset: int
    ) -> torch.Tensor:
        """rotated keys [kv_heads, n, head_dim] at positions [kv_heads, n] -> fp64 [kv_heads, n]."""
        half = len(self.frequencies)
        cached = torch.complex(rotated[..., :half].double(), rotated[..., half : 2 * half].double()) / self.scaling
        key = cached * torch.polar(torch.ones(()).double(), -positions[..., None] * self.frequencies)
        # Both the query and the key are scaled by the model's RoPE (YaRN), and with it their product.
        weight, frequencies = torch.full((half,), self.scaling**2).double(), self.frequencies
        if 2 * half < self.head_dim:  # partial rotary: the tail is a plain dot product, as bands that do not turn
            tail = rotated[..., 2 * half :].double()
            key = torch.cat((key, torch.complex(*tail.chunk(2, dim=-1))), dim=-1)
            weight = torch.cat((weight, torch.ones(tail.shape[-1] // 2).double()))
            frequencies = torch.cat((frequencies, torch.zeros(tail.shape[-1] // 2).double()))
        distance = (now - positions).double()
        result = torch.full(rotated.shape[:2], -torch.inf, dtype=torch.float64)
        for head in range(self.kv_heads * self.group):
            kv_head = head // self.group
            mean, magnitude = self.query_mean[layer, head], self.query_magnitude[layer, head]
            product = mean * key[kv_head].conj()  # [n, bands]: amplitude |E q||k| and phase at distance 0
            trig = torch.zeros(rotated.shape[1], dtype=torch.float64)
            offsets = [2**i for i in range(17) if 2**i <= max_offset]
            for offset in offsets:
                angle = (distance[kv_head] + offset)[:, None] * frequencies + product.angle()
                trig += (weight * product.abs() * angle.cos()).sum(-1)
            score = trig / len(offsets) + (weight * key[kv_head].abs() * (magnitude - mean.abs())).sum(-1)
            result[kv_head] = torch.maximum(result[kv_head], (score - score.mean()) / score.std())
        return result

    @torch.inference_mode()
    def generate(
        self,
        prompt: list[int],
        tokens: int,
        config: CompressionConfig,
        block_size: int,
        in_flight: int,
        chunk: int = 1 << 30,
        allowed: Sequence[int] | None = None,
    ) -> tuple[list[int], int]:
        """Greedy continuation and the number of compactions.

        `in_flight`: tokens already computed beyond those that a compaction sees (1 with async scheduling). `chunk`: the
        prompt is computed so many tokens at a time. `allowed`: the only tokens that may be generated.
        """
        cache = DynamicCache()
        layers = self.model.config.num_hidden_layers
        self.visible = [torch.ones(self.kv_heads, len(prompt) + tokens, dtype=torch.bool) for _ in range(layers)]
        pinned = -(-config.pinned_tokens(len(prompt)) // block_size) * block_size
        first_live, compactions, computed, text = pinned, 0, 0, list(prompt)
        while len(text) < len(prompt) + tokens:
            # The step that computes the first generated token is scheduled before the prompt's last one is settled.
            processed = computed - in_flight if computed > len(prompt) else computed * (in_flight == 0)
            if processed - first_live >= config.budget + config.interval:
                first_live = (processed - config.budget) // block_size * block_size
                self._evict(cache, pinned, processed, processed - first_live, config)
                compactions += 1
            new = text[computed : computed + chunk]
            logits = self.model(torch.tensor([new]), past_key_values=cache).logits[0, -1]
            computed += len(new)
            if computed == len(text):
                if allowed is not None:
                    logits = torch.full_like(logits, -torch.inf).index_copy(0, torch.tensor(allowed), logits[allowed])
                text.append(int(logits.argmax()))
        return text[len(prompt) :], compactions

    def _evict(self, cache: DynamicCache, pinned: int, processed: int, keep: int, config: CompressionConfig) -> None:
        assert self.visible is not None
        candidates, scores = [], []
        compacted = [self.visible[layer] for layer in self.compacted_layers]
        for layer, visible in zip(self.compacted_layers, compacted, strict=True):
            positions = torch.stack([row[:processed].nonzero().flatten() for row in visible])
            positions = torch.stack([row[row >= pinned] for row in positions])
            keys = self.stored(cache.layers[layer].keys[0]).gather(
                1, positions[..., None].expand(-1, -1, self.head_dim)
            )
            candidates.append(positions)
            scores.append(self.scores(keys, positions, layer, processed, config.max_offset))
        if config.selection == "per_head":
            mean = torch.stack(scores).mean(0)
            scores = [mean] * len(scores)
        for visible, positions, score in zip(compacted, candidates, scores, strict=True):
            score = score.masked_fill(positions >= processed - config.window, torch.inf)
            # Positions ascend: segments are runs of columns, of the tokens before the window.
            old, evictions = positions.shape[1] - config.window, positions.shape[1] - keep
            for segment in range(config.segments):
                start, end = segment * old // config.segments, (segment + 1) * old // config.segments
                share = end * evictions // old - start * evictions // old
                ascending = score[:, start:end].sort(dim=-1)
                if 0 < share < end - start:
                    border = ascending.values[:, share] - ascending.values[:, share - 1]
                    assert border.min() > TIE, "rounding decides which of two tokens is evicted: take other numbers"
                dropped = start + ascending.indices[:, :share]
                visible.scatter_(1, positions.gather(1, dropped), False)
