"""`benchmarks/gpu/kernels.py` where there is no GPU: its copies, and what it has written when it fails."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.gpu import kernels


@pytest.mark.parametrize("size", [100, 2048, 5000])
def test_a_copy_is_of_so_many_bytes_in_whatever_memory(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    copied, copy_ = [], torch.Tensor.copy_

    def counted(target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        copied.append(len(source))
        return copy_(target, source)

    scratch = torch.randint(256, (4096,), dtype=torch.uint8)
    copy = kernels.copy_of(size, scratch)
    monkeypatch.setattr(torch.Tensor, "copy_", counted)
    copy(0)
    assert sum(copied) == size


def test_copies_take_turns_in_the_memory() -> None:
    scratch = torch.cat((torch.arange(4096).to(torch.uint8), torch.zeros(4096, dtype=torch.uint8)))
    copy = kernels.copy_of(1000, scratch)
    for turn in range(4):
        copy(turn)
    source, target = scratch.view(2, 8, 512)[:, ::2]
    assert torch.equal(source, target)


def test_what_the_checks_found_is_written_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(*_: object) -> None:
        raise torch.OutOfMemoryError

    out = tmp_path / "new folder" / "gpu.json"
    monkeypatch.setattr(sys, "argv", ["kernels.py", "--json", str(out)])
    monkeypatch.setattr(kernels, "checks", lambda device: [{"worst_score_error": 0.0, "passed": True}])
    monkeypatch.setattr(kernels, "measure", measure)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=1))
    with pytest.raises(torch.OutOfMemoryError):
        kernels.main()
    assert json.loads(out.read_text())["checks"] == [{"worst_score_error": 0.0, "passed": True}]
