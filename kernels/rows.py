"""How do rows get into a message, and out of one?

A message holds rows of several tensors (q, k, v ...), each part end to end. All its parts are moved at once: on CUDA by
one launch, whatever their number, instead of an operator for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np
import torch


class Part(NamedTuple):
    """Some rows of a tensor, and where they are side by side."""

    x: torch.Tensor  # (T, ...), contiguous
    index: torch.Tensor  # (N,) int64
    packed: torch.Tensor  # (N, ...), contiguous


def placed(x: np.ndarray, device: torch.device) -> torch.Tensor:
    """An array on `device`, for launches of this thread's stream; on CUDA the host does not wait for it.

    PyTorch keeps the pinned memory for itself until the copy is over."""
    here = torch.from_numpy(x)
    return here.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else here


def gather(parts: Sequence[Part]) -> None:
    """packed = x[index], for all parts. Its adjoint is to add them up at home."""
    if _moved_by_triton(parts, True):
        return
    for x, index, packed in parts:
        torch.index_select(x, 0, index, out=packed)


def scatter(parts: Sequence[Part]) -> None:
    """x[index] = packed, for all parts; no row is in `index` twice."""
    if _moved_by_triton(parts, False):
        return
    for x, index, packed in parts:
        x.index_copy_(0, index, packed)


def _moved_by_triton(parts: Sequence[Part], gathers: bool) -> bool:
    parts = [part for part in parts if part.packed.numel()]
    if not parts or parts[0].x.device.type != "cuda" or not find_spec("triton"):
        return False
    if any(part.x[0].numel() * part.x.element_size() % 4 for part in parts):  # rows are moved as 32-bit words
        return False
    move_triton(parts, gathers)
    return True


def move_triton(parts: Sequence[Part], gathers: bool) -> None:
    """`gather` or `scatter` in one launch."""
    import triton  # here, so that a machine without Triton can import this file

    from distca.kernels.triton_rows import ROWS, WORDS, move_rows_kernel

    device = parts[0].x.device
    table = placed(np.array([_row_of(part) for part in parts], np.int64), device)
    most = max(len(part.index) for part in parts)
    with torch.cuda.device(device if device.type == "cuda" else -1):
        move_rows_kernel[(triton.cdiv(most, ROWS), len(parts))](table, GATHERS=gathers, ROWS=ROWS, WORDS=WORDS)


def _row_of(part: Part) -> tuple[int, ...]:
    for name, tensor in part._asdict().items():
        assert tensor.is_contiguous(), f"{name} has strides {tensor.stride()}: want contiguous rows"
    words = part.x[0].numel() * part.x.element_size() // 4
    return part.x.data_ptr(), part.index.data_ptr(), part.packed.data_ptr(), len(part.index), words
