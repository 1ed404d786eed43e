"""The bundled model's network for training: Qwen3's computation in few operations, under Qwen3's names.

Owns the shape and the forward pass; `tests/unit/test_training.py` holds it against transformers' Qwen3.
"""

import torch
from torch import nn
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu
from transformers import Qwen3Config

EPSILON = 1e-6

QueriesKeys = tuple[torch.Tensor, torch.Tensor]
"""A layer's queries and keys before RoPE, fp32 [rows, heads, tokens, head_dim]."""


def model_config(vocabulary: int) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000_000.0},
        rms_norm_eps=EPSILON,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        dtype=torch.float32,
    )


class Norm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, (x.shape[-1],), self.weight, EPSILON)


class Attention(nn.Module):
    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        size, self.head = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(size, config.num_attention_heads * self.head, bias=False)
        self.k_proj = nn.Linear(size, config.num_key_value_heads * self.head, bias=False)
        self.v_proj = nn.Linear(size, config.num_key_value_heads * self.head, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head, size, bias=False)
        self.q_norm, self.k_norm = Norm(self.head), Norm(self.head)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, QueriesKeys]:
        rows, length, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(rows, length, -1, self.head)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(rows, length, -1, self.head)).transpose(1, 2)
        v = self.v_proj(x).view(rows, length, -1, self.head).transpose(1, 2)
        rotated_q, rotated_k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)
        seen = scaled_dot_product_attention(rotated_q, rotated_k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(seen.transpose(1, 2).reshape(rows, length, -1)), (q, k)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    one, other = x.chunk(2, dim=-1)
    return torch.cat((one * cos - other * sin, other * cos + one * sin), dim=-1)


class Feedforward(nn.Module):
    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        size, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(size, inner, bias=False)
        self.up_proj = nn.Linear(size, inner, bias=False)
        self.down_proj = nn.Linear(inner, size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(config), Feedforward(config)
        self.input_layernorm, self.post_attention_layernorm = Norm(config.hidden_size), Norm(config.hidden_size)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, QueriesKeys]:
        seen, read = self.self_attn(self.input_layernorm(x), cos, sin)
        x = x + seen
        return x + self.mlp(self.post_attention_layernorm(x)), read


class Network(nn.Module):
    """State-dict names are those of `Qwen3ForCausalLM.model`."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = Norm(config.hidden_size)
        bands = torch.arange(0, config.head_dim, 2) / config.head_dim
        self.frequencies = config.rope_parameters["rope_theta"] ** -bands

    def forward(self, ids: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, list[QueriesKeys]]:
        """Hidden states fp32 [rows, tokens, hidden_size] of ids and positions [rows, tokens], and what each layer
        read by; causal, unpadded."""
        cos, sin = self.rotation(positions)
        x, reads = self.embed_tokens(ids), []
        for layer in self.layers:
            x, read = layer(x, cos, sin)
            reads.append(read)
        return self.norm(x), reads

    def rotation(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """RoPE's cos and sin, fp32 [rows, 1, tokens, bands]."""
        angles = (positions[..., None] * self.frequencies)[:, None]
        return angles.cos(), angles.sin()
