# mypy: disallow-untyped-defs=false, disallow-incomplete-defs=false
"""What the kernels' launches share: strides, tiles, and which arguments Triton may specialise on."""

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from triattention.kernels.vocabulary import PagedCache, to_device

INTEGERS = {1: tl.uint8, 2: tl.int16, 4: tl.int32}
"""By size: what only moves numbers need not know their kind."""

# What changes from launch to launch must not be part of what is compiled: an engine would stop for seconds when a
# step brings a number that divides by 16 for the first time.
per_launch = triton.jit(
    do_not_specialize=["total_tokens", "total_fills", "first_layer", "layer_stride", "row_stride", "window"],
    do_not_specialize_on_alignment=[
        "block_ids", "requests", "tiles", "rotations", "scores", "source", "target", "block_table", "lengths",
    ],
)  # fmt: skip


def strides(cache: PagedCache) -> tuple[int, int, int, int]:
    """Of block, head, token and number, in numbers."""
    block, head, token, _, number, _ = cache.layers[0].stride()
    return block, head, token, number


def tiles_of(first: Sequence[int], size: int, device: torch.device) -> Tensor:
    """Cuts every request's part into tiles of at most `size`: int32 [tiles, 2] of request and start within it."""
    counts = -(-np.diff(first) // size)
    request = np.repeat(np.arange(len(counts)), counts)
    number = np.arange(len(request)) - np.repeat(np.cumsum(counts) - counts, counts)
    return to_device(np.stack([request, number * size], axis=1), device)
