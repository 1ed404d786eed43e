"""The Triton kernels, compiled for an H200 (compute capability 9.0) by Triton's own compiler; no GPU is needed."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget

from tests.unit.kernel_cases import Case, make_case
from triattention.kernels import with_triton
from triattention.kernels.with_triton import moving, planning, scoring, squeezing

pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")

KERNELS = {
    "_raw_scores_kernel": scoring,
    "_standardise_kernel": scoring,
    "_plan_kernel": planning,
    "_compact_kernel": moving,
    "_squeeze_kernel": squeezing,
}
_POINTERS = {torch.int64: "*i64", torch.int32: "*i32", torch.float32: "*fp32"}


class Recorder:
    """Stands in for a kernel and remembers what it is launched with."""

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **keywords: Any) -> None:
            self.grid, self.arguments, self.keywords = grid, arguments, keywords

        return launch


def compiled(name: str, case: Case, shared: bool = True) -> Any:
    """The kernel as it would be compiled for this case's launch, specialised as Triton specialises."""
    kernel = getattr(KERNELS[name], name)
    recorders = {kernel_name: Recorder() for kernel_name in KERNELS}
    with ExitStack() as stack:
        for kernel_name, module in KERNELS.items():
            stack.enter_context(patch.object(module, kernel_name, recorders[kernel_name]))
        scores = with_triton.score(case.keys, case.weights, case.regions)
        with_triton.compact(case.keys, case.values, case.regions, with_triton.plan(scores, case.regions, 0, shared))
        table = torch.zeros((len(case.regions), 8 * len(case.regions)), dtype=torch.int32)[:, :8]
        lengths = case.regions.requests[:, 1].contiguous()
        with_triton.squeeze(table, lengths, case.regions.block_size, torch.empty_like(table), torch.empty_like(lengths))
    launch = recorders[name]
    given = dict(zip(kernel.arg_names, launch.arguments, strict=False)) | launch.keywords
    signature, constants, hints = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = given.pop(parameter.name)
        is_tensor = isinstance(value, torch.Tensor)
        is_one = not is_tensor and not parameter.do_not_specialize and value == 1
        if parameter.is_constexpr or is_one:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        signature[parameter.name] = _POINTERS[value.dtype] if is_tensor else "i32"
        free = parameter.do_not_specialize or parameter.do_not_specialize_on_alignment
        if not free and (value.data_ptr() if is_tensor else value) % 16 == 0:
            hints[(index,)] = [["tt.divisibility", 16]]
    source = triton.compiler.ASTSource(kernel, signature, constants, hints)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=given)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_compiles_for_hopper(name: str) -> None:
    assert compiled(name, make_case(kv_heads=8, dead_slots=(16,))).asm["cubin"]


@pytest.mark.parametrize("name", KERNELS)
def test_one_compilation_serves_every_launch(name: str) -> None:
    """Otherwise an engine would stop for seconds when a step's numbers divide by 16 for the first time."""
    small = make_case(kv_heads=8, tokens=(17,), dead_slots=(1,))
    large = make_case(kv_heads=8, tokens=(48, 80, 64, 16), dead_slots=(16, 32, 0, 0))
    assert compiled(name, small).hash == compiled(name, large, shared=False).hash


@pytest.mark.parametrize("layout", ["NHD", "HND", "blocks first"])
@pytest.mark.parametrize(("head_dim", "group"), [(128, 4), (80, 8)])
def test_scoring_loads_keys_16_bytes_at_a_time_ahead_and_multiplies_on_tensor_cores(
    layout: str, head_dim: int, group: int
) -> None:
    ptx = compiled(
        "_raw_scores_kernel", make_case(torch.bfloat16, head_dim, group, layout=layout, dead_slots=(16,))
    ).asm["ptx"]
    keys = [line for line in ptx.splitlines() if "cp.async.c" in line and " 0x10" in line]
    assert len(keys) >= 16  # two halves of 64 tokens, 8 loads per thread, at least two tiles
    assert "ld.global.b16" not in ptx
    assert "wgmma.mma_async" in ptx


@pytest.mark.parametrize(
    ("dtype", "head_dim", "group"),
    [(torch.float16, 128, 8), (torch.float32, 128, 4), (torch.float8_e4m3fn, 128, 4), (torch.bfloat16, 256, 2)],
    ids=str,
)
def test_scoring_compiles_for_other_dtypes_and_head_dims(dtype: torch.dtype, head_dim: int, group: int) -> None:
    compiled("_raw_scores_kernel", make_case(dtype, head_dim, group, dead_slots=(16,)))


@pytest.mark.parametrize("layout", ["NHD", "HND", "blocks first"])
def test_compaction_copies_rows_16_bytes_at_a_time(layout: str) -> None:
    case = make_case(layout=layout, tokens=(48,), dead_slots=(16,))
    ptx = compiled("_compact_kernel", case).asm["ptx"]
    assert ptx.count("ld.global.v4.b32") == ptx.count("st.global.v4.b32") >= 2
    assert ".b16" not in "".join(line for line in ptx.splitlines() if "global" in line)
