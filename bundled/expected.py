"""A term of the training loss: what is read late should be foreseen by the mean query, as TriAttention scores keys.

A lookup made by one query in fifty leaves no trace in the mean query, so its key scores like any other and is evicted
before it is read. Large models' queries are concentrated enough that it does not matter (the paper's section 3); a
model this small has to be asked.
"""

import torch

from bundled.curriculum import IGNORED, Batch
from bundled.network import Network, QueriesKeys, rotate

RECENT = 32
"""Keys up to so many tokens back are in the recent window whatever they score."""
READ = 0.1
"""Attention weight from which on a key counts as read."""
FORESEEN = 2.0
"""Standard deviations above the mean of a reply's scores that put a key among those that a small budget keeps."""
_OFFSETS = 2.0 ** torch.arange(17)


def unforeseen_reads(reads: list[QueriesKeys], batch: Batch, network: Network) -> torch.Tensor:
    """By how much the keys of replies that are read late fall short of FORESEEN, in standard deviations; a scalar.

    The score of a key is the one of `triattention.scoring`, taken at the end of its row with the batch's own query
    statistics; of a group's query heads the highest counts.
    """
    replies = torch.stack([_reply(labels) for labels in batch.labels])
    ids, places = batch.ids, torch.arange(batch.ids.shape[1])
    real = (ids != 0)[:, None, :, None]
    far = places[:, None] - places[None, :] > RECENT
    cos, sin = network.rotation(batch.positions)
    past = batch.positions[:, -1:] - batch.positions
    angles = past[..., None] * network.frequencies
    waves = (_OFFSETS[:, None] * network.frequencies).double()
    ahead = torch.polar(torch.ones_like(waves), waves).mean(dim=0).to(torch.complex64)
    turned = torch.polar(torch.ones_like(angles), angles) * ahead  # [rows, tokens, bands]
    short: list[torch.Tensor] = []
    for q, k in reads:
        q, k = q.float(), k.float()
        heads, kv_heads = q.shape[1], k.shape[1]
        with torch.no_grad():
            group = rotate(k, cos, sin).repeat_interleave(heads // kv_heads, dim=1)
            weights = rotate(q, cos, sin) @ group.transpose(-1, -2) * q.shape[-1] ** -0.5
            weights = weights.masked_fill_(places[:, None] < places[None, :], -torch.inf).softmax(dim=-1)
            read = ((weights > READ) & far & replies[:, None, :, None]).any(dim=2)  # by a token of a reply
            read = read.unflatten(1, (kv_heads, -1)).any(dim=2) & replies[:, None]
        queries, keys = _complex(q), _complex(k)
        count = real.sum()
        mean = (queries * real).sum(dim=(0, 2)) / count  # [heads, bands]
        size = (queries.abs() * real).sum(dim=(0, 2)) / count
        keys = keys.repeat_interleave(heads // kv_heads, dim=1)
        trig = (mean[:, None] * turned[:, None] * keys.conj()).real.sum(dim=-1)
        scores = trig + ((size - mean.abs())[:, None] * keys.abs()).sum(dim=-1)  # [rows, heads, tokens]
        of_reply = replies[:, None].float()
        total = of_reply.sum(dim=-1, keepdim=True)
        centred = scores - (scores * of_reply).sum(dim=-1, keepdim=True) / total
        deviation = ((centred.square() * of_reply).sum(dim=-1, keepdim=True) / total + 1e-12).sqrt()
        score = (centred / deviation).unflatten(1, (kv_heads, -1)).amax(dim=2)
        short.append((FORESEEN - score)[read].clamp(min=0))
    every = torch.cat(short)
    return every.mean() if len(every) else every.sum()


def _complex(x: torch.Tensor) -> torch.Tensor:
    one, other = x.chunk(2, dim=-1)
    return torch.complex(one, other)


def _reply(labels: torch.Tensor) -> torch.Tensor:
    """bool [tokens]: from the first trained token of a row to its last one."""
    trained = (labels != IGNORED).nonzero()
    mask = torch.zeros_like(labels, dtype=torch.bool)
    if len(trained):
        mask[int(trained[0]) : int(trained[-1]) + 1] = True
    return mask
