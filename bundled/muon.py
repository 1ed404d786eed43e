"""Muon (Keller Jordan, 2024) in fp32. `torch.optim.Muon` orthogonalises in bf16, which takes twenty times as long on a
CPU without bf16 instructions, and then most of a training step."""

from collections.abc import Iterable

import torch

MOMENTUM = 0.95
_ROUNDS = 5
_A, _B, _C = 3.4445, -4.7750, 2.0315
"""Of the quintic iteration: steepest at zero, singular values end between 0.5 and 1.5."""


class Muon(torch.optim.Optimizer):
    """Updates matrices, fp32 [out, in], by their orthogonalised Nesterov momentum."""

    def __init__(self, matrices: Iterable[torch.Tensor], lr: float) -> None:
        super().__init__(matrices, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # nothing here evaluates a closure
        for group in self.param_groups:
            for matrix in group["params"]:
                momentum = self.state[matrix].setdefault("momentum", torch.zeros_like(matrix))
                momentum.lerp_(matrix.grad, 1 - MOMENTUM)
                update = orthogonal(matrix.grad.lerp(momentum, MOMENTUM))
                out, size = matrix.shape
                matrix.add_(update, alpha=-group["lr"] * max(1.0, out / size) ** 0.5)


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """A matrix [out, in] of the same singular vectors whose singular values are all near 1, by Newton and Schulz."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    wide = wide / wide.norm().clamp(min=1e-7)
    for _ in range(_ROUNDS):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=_B, alpha=_C), wide, beta=_A)
    return wide if matrix.shape[0] <= matrix.shape[1] else wide.T
