"""The TriAttention score of cached keys: expected attention of future queries, from query statistics.

Queries and keys before RoPE are complex numbers per frequency band f of angular frequency w_f (radians per
token). The score of key k at distance D from the query position is the mean over future offsets d of

    S(k, D + d) = sum_f |E q_f| |k_f| cos(w_f (D + d) + phase_f)  +  sum_f (E|q_f| - |E q_f|) |k_f|

with phase_f = arg(E q_f) - arg(k_f). Cached keys are rotated already: k~_f = k_f exp(i w_f p) for a key at
position p = t - D. The first sum is therefore, with no position of any key,

    Re sum_f E[q_f] exp(i w_f (t + d)) conj(k~_f)

and the mean over d moves into one vector per query head: C_f(t) = mean_d exp(i w_f (t + d)),

    S(k~) = Re sum_f (E[q_f] C_f(t)) conj(k~_f)  +  sum_f (E|q_f| - |E q_f|) |k~_f|.

`attention_scaling` a (YaRN): the model's cos and sin tables hold it, so an attention product holds a^2.
Cached keys bring one factor, the query statistics (taken before RoPE) none: bands are multiplied by a once
more here. The unrotated tail of partial rotary has no such factor and frequency zero (see
`triattention.rope`).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from triattention.kernels.vocabulary import QueryWeights
from triattention.kernels.with_torch import standardise as standardise  # policies of one's own take it from here
from triattention.statistics import QueryStatistics


def offsets_up_to(maximum: int) -> tuple[int, ...]:
    """Future distances over which the expected attention is averaged, in tokens: 1, 2, 4, ..., `maximum`."""
    assert maximum.bit_count() == 1, f"{maximum} is not a power of two"
    return tuple(1 << power for power in range(maximum.bit_length()))


OFFSETS = offsets_up_to(65536)
"""The paper's 17 offsets."""

# Keys are read in slices of tokens whose fp32 copies stay below this, so that only the scores grow with the
# tokens.
_SLICE_BYTES = 64 << 20


def mean_rotation(frequencies: Tensor, position: int, offsets: Sequence[int] = OFFSETS) -> Tensor:
    """C_f(t) = mean over offsets d of exp(i w_f (t + d)), complex128 [bands].

    `frequencies`: fp64 [bands]. In fp64, reduced modulo 2 pi first: w t reaches 1e5 radians, where fp32 has
    lost two decimals of the phase.
    """
    assert frequencies.dtype == torch.float64
    times = torch.tensor([position + d for d in offsets], dtype=torch.float64)
    phases = torch.remainder(times[:, None] * frequencies, 2 * math.pi)
    return torch.polar(torch.ones_like(phases), phases).mean(dim=0)


class Scorer:
    """Scores the cached keys of some layers and KV heads of a model.

    `layers`: model layer indices, in the order of the keys. `kv_heads`: global KV head indices (a
    tensor-parallel rank holds a part of them). Holds two vectors of bands per query head and layer, moved to
    the keys' device.
    """

    def __init__(
        self,
        statistics: QueryStatistics,
        layers: Sequence[int],
        kv_heads: range,
        offsets: Sequence[int] = OFFSETS,
    ) -> None:
        rope = statistics.rope
        group = statistics.q_heads // statistics.kv_heads
        rows = [statistics.layers.index(layer) for layer in layers]
        heads = [kv_head * group + member for kv_head in kv_heads for member in range(group)]
        shape = (len(rows), len(kv_heads), group, rope.bands)

        mean = statistics.query_mean[rows][:, heads].to(torch.complex128)
        magnitude = statistics.query_magnitude[rows][:, heads].double()
        scales = rope.scales()
        self.rope = rope
        self.frequencies = rope.frequencies()
        self.offsets = offsets
        self.query_mean = (mean * scales).to(torch.complex64).view(shape)
        # E|q| >= |E q| holds exactly for the sums, but not for their rounded quotients.
        self.spread = ((magnitude - mean.abs()).clamp_min(0) * scales).float().view(shape)

    def query_weights(self, device: torch.device) -> QueryWeights:
        """The same scores for `triattention.kernels`, which read the keys where they lie."""
        return QueryWeights(
            mean_real=self.query_mean.real.contiguous().to(device),
            mean_imag=self.query_mean.imag.contiguous().to(device),
            spread=self.spread.to(device),
            frequencies=self.frequencies,
            offset_mean=mean_rotation(self.frequencies, 0, self.offsets),
            rotary_dim=self.rope.rotary_dim,
            interleaved=self.rope.style == "gptj",
        )

    def raw_scores(self, keys: Tensor, position: int) -> Tensor:
        """S of each query head, fp32 [layers, kv_heads, query heads of the group, tokens].

        `keys`: [layers, kv_heads, tokens, head_dim], rotated, any float dtype; `position`: of the next query.
        """
        layers, kv_heads, tokens, head_dim = keys.shape
        if self.query_mean.device != keys.device:
            self.query_mean, self.spread = self.query_mean.to(keys.device), self.spread.to(keys.device)
        rotation = mean_rotation(self.frequencies, position, self.offsets)
        turned = self.query_mean * rotation.to(torch.complex64).to(keys.device)
        real_weight, imag_weight = turned.real.contiguous(), turned.imag.contiguous()

        scores = torch.empty((*turned.shape[:3], tokens), dtype=torch.float32, device=keys.device)
        step = max(1, _SLICE_BYTES // (4 * layers * kv_heads * head_dim))
        for start in range(0, tokens, step):
            real, imag = self.rope.split(keys[:, :, start : start + step].float())
            real, imag = real.transpose(-1, -2), imag.transpose(-1, -2)
            part = real_weight @ real
            part += imag_weight @ imag
            part += self.spread @ torch.hypot(real, imag)
            scores[..., start : start + step] = part
        return scores

    def score(self, keys: Tensor, position: int) -> Tensor:
        """Scores fp32 [layers, kv_heads, tokens]: each query head's z-scores over the tokens, then the
        group's maximum.

        Arguments as in `raw_scores`.
        """
        return standardise(self.raw_scores(keys, position)).amax(dim=2)
