"""The Triton kernels on the CPU, under Triton's interpreter, in a process of its own.

Triton decides when it is imported whether it interprets, for every kernel of the process; vLLM's kernels, in the same
pytest process, must not be. So a child is started with TRITON_INTERPRET set, and calls are pickled to it and back.
"""

import io
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any
from unittest.mock import patch

import torch

from tests.unit.kernel_cases import Case, poisoned_outputs
from triattention.kernels import HoleFills, LiveRegions

Interpret = Callable[..., Any]
"""interpret(function, *arguments) is what the function returns in the child; arguments are copied."""


@contextmanager
def interpreter() -> Iterator[Interpret]:
    with ProcessPoolExecutor(1, get_context("spawn"), _start) as pool:

        def interpret(function: Callable[..., Any], *arguments: Any) -> Any:
            return _loads(pool.submit(_call, _dumps((function, arguments))).result())

        yield interpret


def _start() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    multiply_bf16_as_numbers()


def multiply_bf16_as_numbers() -> None:
    """In a process that interprets. Not in one that compiles: it is imported here."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    # The interpreter keeps bf16 as uint16 and its dot multiplies those integers (Triton issue 11584).
    dot = InterpreterBuilder.create_dot

    def widened(operand: Any) -> Any:
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        return TensorHandle((operand.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, widened(a), widened(b), *rest)

    InterpreterBuilder.create_dot = create_dot


def _call(pickled: bytes) -> bytes:
    function, arguments = _loads(pickled)
    with poisoned_outputs():
        return _dumps(function(*arguments))


def _dumps(anything: Any) -> bytes:
    """torch's own pickling: views of one memory stay views of one memory, in any dtype."""
    file = io.BytesIO()
    torch.save(anything, file)
    return file.getvalue()


def _loads(pickled: bytes) -> Any:
    return torch.load(io.BytesIO(pickled), weights_only=False)


def score(case: Case) -> torch.Tensor:
    from triattention.kernels import with_triton

    return with_triton.score(case.keys, case.weights, case.regions)


def score_in_small_pieces(case: Case) -> torch.Tensor:
    """One layer at a time, several tiles per program, several passes per row of scores."""
    from triattention.kernels.with_triton import scoring

    with patch.multiple(scoring, _RAW_BYTES=1, _SCORES_AT_ONCE=64):
        return scoring.score(case.keys, case.weights, case.regions, scoring.Tiling(tile=16, tiles=2))


def key_reads(case: Case) -> torch.Tensor:
    """Addresses of all numbers that scoring reads from the keys, int64, as often as it reads them."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder

    load, reads = InterpreterBuilder.create_masked_load, []

    def create_masked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        if pointers.get_element_ty() == tl.bfloat16:
            reads.append(pointers.data[mask.data])
        return load(self, pointers, mask, *rest)

    with patch.object(InterpreterBuilder, "create_masked_load", create_masked_load):
        score(case)
    first = case.memory.data_ptr()
    return torch.from_numpy((np.concatenate(reads).astype(np.int64) - first) // case.memory.element_size())


def plan(scores: torch.Tensor, regions: LiveRegions, window: int, shared: bool, at_once: int) -> HoleFills:
    from triattention.kernels.with_triton import planning

    with patch.object(planning, "_RANKS_AT_ONCE", at_once):
        return planning.plan(scores, regions, window, shared)


def compact(case: Case, fills: HoleFills) -> torch.Tensor:
    """The cache's memory afterwards."""
    from triattention.kernels import with_triton

    with_triton.compact(case.keys, case.values, case.regions, fills)
    return case.memory


def squeeze(table: torch.Tensor, lengths: torch.Tensor, block_size: int, at_once: int) -> Any:
    """The squeezed table and the live lengths."""
    from triattention.kernels.with_triton import squeezing

    squeezed, live = torch.empty_like(table), torch.empty_like(lengths)
    with patch.object(squeezing, "_IDS_AT_ONCE", at_once):
        squeezing.squeeze(table, lengths, block_size, squeezed, live)
    return squeezed, live
