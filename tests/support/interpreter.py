"""Run something in Triton's interpreter: `interpreted(function, *arguments)`, in a process of its own.

Triton reads TRITON_INTERPRET when it is imported, so one process either interprets kernels or compiles them. The
interpreter keeps bf16 as 16-bit integers: left alone it would multiply those, and cut digits off where a GPU rounds."""

import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import cache
from multiprocessing import get_context
from unittest.mock import patch

import numpy as np


def interpreted(function, *arguments):
    """`function(*arguments)` of a function that can be imported, in a process that stays until the tests end."""
    return _process().submit(function, *arguments).result()


def run_as_on(capability: tuple[int, int], dtype, problem):
    """`problem.run`, with the kernels' variants for this GPU and this dtype, whatever the problem's own."""
    from distca.kernels import triton_attention

    def variant(kernel, head_dim, _dtype, softcap, _capability, triton):
        return variant_of(kernel, head_dim, dtype, softcap, capability, triton)

    variant_of = triton_attention.variant_of
    with patch.object(triton_attention, "variant_of", variant):
        return problem.run("triton")


@cache
def _process() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, get_context("spawn"), initializer=interpret)


def interpret() -> None:
    """Make this process one that interprets; nothing in it may have imported Triton yet."""
    os.environ |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}

    import torch
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    from distca.kernels import capability

    torch.set_num_threads(1)
    plain_cast, plain_dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def widen(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def cast(self, x, to):
        if (x.dtype.scalar, to.scalar) == (tl.bfloat16, tl.float32):
            return widen(x)
        if (x.dtype.scalar, to.scalar) == (tl.float32, tl.bfloat16):
            return TensorHandle(_nearest_bfloat16(x.data), tl.bfloat16)
        return plain_cast(self, x, to)

    def dot(self, a, b, *rest):
        return plain_dot(self, widen(a), widen(b), *rest)

    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = cast, dot
    row = capability.CAPABILITIES["triton", "cpu"]
    capability.CAPABILITIES["triton", "cpu"] = replace(row, dtypes=(*row.dtypes, torch.bfloat16))


def _nearest_bfloat16(x: np.ndarray) -> np.ndarray:
    """Its bits, ties to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)
