"""Triton's interpreter, with bf16 done right. Import this before a kernel runs.

The interpreter keeps bf16 as 16-bit integers: it would multiply those, and cut digits off where a GPU rounds."""

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_cast, _dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot


def _widen(x: TensorHandle) -> TensorHandle:
    """bf16 as the float32 of the same value; others as they are."""
    if x.dtype.scalar != tl.bfloat16:
        return x
    return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _round(x: np.ndarray) -> np.ndarray:
    """The bits of the nearest bf16, ties to even."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)


def cast_impl(self, x: TensorHandle, to: tl.dtype) -> TensorHandle:
    if (x.dtype.scalar, to.scalar) == (tl.bfloat16, tl.float32):
        return _widen(x)
    if (x.dtype.scalar, to.scalar) == (tl.float32, tl.bfloat16):
        return TensorHandle(_round(x.data), tl.bfloat16)
    return _cast(self, x, to)


def create_dot(self, a: TensorHandle, b: TensorHandle, *rest) -> TensorHandle:
    return _dot(self, _widen(a), _widen(b), *rest)


InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = cast_impl, create_dot
