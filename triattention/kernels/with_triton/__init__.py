"""Score, plan, compact and squeeze as Triton kernels, for NVIDIA GPUs from Hopper on. Same results as `with_torch`."""

from triattention.kernels.with_triton.moving import compact
from triattention.kernels.with_triton.planning import plan
from triattention.kernels.with_triton.scoring import TILING, Tiling, raw_scores, score
from triattention.kernels.with_triton.squeezing import squeeze

__all__ = ["TILING", "Tiling", "compact", "plan", "raw_scores", "score", "squeeze"]
