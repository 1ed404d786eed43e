"""Muon against singular values by LAPACK and against torch's own, which computes in bf16."""

import pytest
import torch

from bundled.muon import Muon, orthogonal


@pytest.mark.parametrize("shape", [(128, 384), (384, 128)])
def test_an_update_keeps_the_directions_and_evens_out_the_singular_values(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    core = left.T @ orthogonal(matrix).double() @ right.T
    assert (core - torch.diag(core.diag())).abs().max() < 1e-3
    assert core.diag().min() > 0.5
    assert core.diag().max() < 1.5


def test_steps_go_where_torchs_go() -> None:
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(64, 32, generator=generator)
    ours, theirs = start.clone(), torch.nn.Parameter(start.clone())
    mine = Muon([ours.requires_grad_()], lr=0.02)
    other = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.0)
    for _ in range(5):
        ours.grad = torch.randn(64, 32, generator=generator)
        theirs.grad = ours.grad.clone()
        mine.step()
        other.step()
    moved, expected = ours.detach() - start, theirs.detach() - start
    assert (moved - expected).norm() < 0.02 * expected.norm()  # bf16 keeps eight bits
