"""How is a task list computed by our own kernels? Back end "triton": one launch per call, whatever the tasks.

Promises, besides those of the reference, which has the same signatures:

  - equal calls give equal bits;
  - out, lse and dq of a row have the same bits however the tasks are cut along their rows, and dk and dv of a key
    however they are cut along their keys, as long as rows and keys keep their places modulo 128, counted from the start
    of the packed buffers (`routes.TILE`). Only a document that is cut, or attended at one place here and at another
    there, needs such places: for it rows and keys must lie at their own numbers in the document modulo 128, queries and
    keys each for itself. A document that is whole and always attended at the same rows may start at any of them, and
    several may share a tile: a row's bits do not depend on its neighbours;
  - where descriptors are used (see `variant_of`), rows that no task touches must be finite.

Kernels run on CUDA, and on a CPU in Triton's interpreter (TRITON_INTERPRET=1), which is for tests.
"""

# Shape suffixes: S query rows and C key rows on a server, H query heads, G key/value heads, D head size.

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F

from distca.kernels.merge import statistics_dtype
from distca.kernels.rows import placed
from distca.kernels.worklist import work_list
from distca.masks import Bands, transpose

LOG2E = 1.4426950408889634


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to compile a kernel: its tile sizes, its threads, how it loads."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int
    described: bool = False
    specialized: bool = False


def attend_triton(
    q_SHD: torch.Tensor,
    k_CGD: torch.Tensor,
    v_CGD: torch.Tensor,
    tasks: Bands,
    *,
    scale: float,
    softcap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out_SHD in the inputs' dtype, and lse_SH in float32."""
    out_SHD = torch.empty_like(q_SHD)
    lse_SH = torch.empty(q_SHD.shape[:2], dtype=statistics_dtype(q_SHD.dtype), device=q_SHD.device)
    _launch("forward", q_SHD, k_CGD, v_CGD, tasks, scale, softcap, out_ptr=out_SHD, lse_ptr=lse_SH)
    return out_SHD, lse_SH


def attend_backward_triton(
    q_SHD: torch.Tensor,
    k_CGD: torch.Tensor,
    v_CGD: torch.Tensor,
    lse_SH: torch.Tensor,
    delta_SH: torch.Tensor,
    d_out_SHD: torch.Tensor,
    tasks: Bands,
    *,
    scale: float,
    softcap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq_SHD, dk_CGD, dv_CGD of these tasks, in the inputs' dtype. lse and delta are final: see the reference."""
    dq_SHD, dk_CGD, dv_CGD = (torch.empty_like(x) for x in (q_SHD, k_CGD, v_CGD))
    # kernels read both along rows; descriptors want lines of 16 bytes
    lse2_HS, delta_HS = (F.pad(x.T, (0, -len(x) % 4)).contiguous() for x in (lse_SH * LOG2E, delta_SH))
    saved = dict(lse2_ptr=lse2_HS, delta_ptr=delta_HS, d_out_ptr=d_out_SHD, stride=lse2_HS.shape[1])
    _launch("dq", q_SHD, k_CGD, v_CGD, tasks, scale, softcap, **saved, dq_ptr=dq_SHD)
    _launch("dkdv", q_SHD, k_CGD, v_CGD, tasks, scale, softcap, **saved, dk_ptr=dk_CGD, dv_ptr=dv_CGD)
    return dq_SHD, dk_CGD, dv_CGD


# (kernel, size that holds a head) -> tile sizes, warps, stages. Found by compiling: none of them spills registers or
# asks for more shared memory than there is; `python -m distca.kernels.aot` prints what each one takes.
ANY_GPU = {
    ("forward", 64): Variant(128, 64, 8, 2),
    ("forward", 128): Variant(128, 64, 8, 2),
    ("forward", 256): Variant(64, 32, 8, 2),
    ("dq", 64): Variant(128, 64, 8, 2),
    ("dq", 128): Variant(128, 64, 8, 2),
    ("dq", 256): Variant(64, 32, 8, 1),
    ("dkdv", 64): Variant(64, 64, 4, 2),
    ("dkdv", 128): Variant(64, 64, 8, 2),
    ("dkdv", 256): Variant(32, 32, 8, 1),
}
HOPPER = {
    ("forward", 64): Variant(128, 128, 4, 3, described=True, specialized=True),
    ("forward", 128): Variant(128, 128, 4, 2, described=True, specialized=True),
    ("forward", 256): Variant(128, 64, 8, 2, described=True),
    ("dq", 64): Variant(128, 128, 8, 2, described=True),
    ("dq", 128): Variant(128, 64, 8, 2, described=True),
    ("dq", 256): Variant(64, 64, 8, 2, described=True),
    ("dkdv", 64): Variant(64, 128, 4, 2, described=True, specialized=True),
    ("dkdv", 128): Variant(64, 128, 4, 2, described=True, specialized=True),
    ("dkdv", 256): Variant(32, 64, 8, 2, described=True),
}
FLOAT32 = {
    64: Variant(32, 32, 4, 1),
    128: Variant(16, 32, 8, 1),
    256: Variant(16, 16, 8, 1),
}  # exact, so no tensor cores
INTERPRETER = {"forward": Variant(128, 128, 4, 1), "dq": Variant(128, 64, 4, 1), "dkdv": Variant(64, 128, 4, 1)}


def variant_of(
    kernel: str, head_dim: int, dtype: torch.dtype, softcap: bool, capability: tuple[int, int] | None, triton: str
) -> Variant:
    """How to compile `kernel` ("forward", "dq", "dkdv" or "delta") for a GPU of this compute capability (None: the
    interpreter) with this version of Triton: the one place where that is decided."""
    if kernel == "delta":  # reads memory once and computes next to nothing, on every GPU
        return Variant(4096 // block_d(head_dim), 1, 4, 1)
    if capability is None:
        return INTERPRETER[kernel]
    size = max(64, block_d(head_dim))
    if dtype == torch.float32:
        return FLOAT32[size]
    if capability[0] != 9 or head_dim != size:  # descriptors take whole powers of two
        return ANY_GPU[kernel, size]
    if kernel == "dq" and size < 256 and triton.startswith("3.6."):  # 3.7 to 3.9 crash on its row vectors
        return replace(HOPPER[kernel, size], num_warps=4, specialized=True)
    if kernel == "dkdv" and size == 128 and softcap:  # 64 queries would spill
        return replace(HOPPER[kernel, size], block_q=32)
    return HOPPER[kernel, size]


def constants_of(variant: Variant, num_heads: int, num_groups: int, head_dim: int, softcap: bool) -> dict[str, Any]:
    """A kernel's compile-time arguments."""
    return dict(
        H=num_heads,
        G=num_groups,
        D=head_dim,
        BLOCK_D=block_d(head_dim),
        BLOCK_Q=variant.block_q,
        BLOCK_K=variant.block_k,
        SOFTCAP=softcap,
        STAGES=variant.num_stages,
        DESCRIBED=variant.described,
        SPECIALIZED=variant.specialized,
    )


def block_d(head_dim: int) -> int:
    """The power of two that holds a head; matrix products need at least 16."""
    return max(16, 1 << (head_dim - 1).bit_length())


def _launch(
    kernel: str,
    q_SHD: torch.Tensor,
    k_CGD: torch.Tensor,
    v_CGD: torch.Tensor,
    tasks: Bands,
    scale: float,
    softcap: float,
    **arguments,
) -> None:
    import triton  # here, so that a machine without Triton can import this file

    from distca.kernels import triton_kernels

    (num_rows, num_heads, head_dim), (num_keys, num_groups, _) = q_SHD.shape, k_CGD.shape
    on_gpu = q_SHD.device.type == "cuda"
    capability = torch.cuda.get_device_capability(q_SHD.device) if on_gpu else None
    variant = variant_of(kernel, head_dim, q_SHD.dtype, softcap > 0, capability, triton.__version__)
    items, entries = _list_on(q_SHD.device, kernel, tasks.to_bytes(), num_rows, num_keys, num_groups, variant)
    programs = len(items) * (1 if kernel == "dkdv" else num_heads // num_groups)
    if not programs:
        return
    triton.set_allocator(_allocate)  # of this thread; kernels that make descriptors need it
    with torch.cuda.device(q_SHD.device) if on_gpu else nullcontext():
        triton_kernels.KERNELS[kernel][(programs,)](
            q_ptr=q_SHD,
            k_ptr=k_CGD,
            v_ptr=v_CGD,
            items_ptr=items,
            entries_ptr=entries,
            num_rows=num_rows,
            num_keys=num_keys,
            scale=scale,
            softcap=softcap,
            **arguments,
            **constants_of(variant, num_heads, num_groups, head_dim, softcap > 0),
            num_warps=variant.num_warps,
            num_stages=variant.num_stages,
        )


@lru_cache(maxsize=64)  # a micro-batch's layers share their tasks
def _list_on(
    device: torch.device, kernel: str, columns: bytes, num_rows: int, num_keys: int, num_groups: int, variant: Variant
) -> tuple[torch.Tensor, torch.Tensor]:
    """The work list of a kernel, on its device: items (N, 4) and entries (E, 8)."""
    tasks = Bands.from_bytes(columns)
    if kernel == "dkdv":
        work = work_list(transpose(tasks), num_keys, num_groups, variant.block_k, variant.block_q)
    else:
        work = work_list(tasks, num_rows, num_groups, variant.block_q, variant.block_k)
    return placed(work.items, device), placed(work.entries, device)


def _allocate(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")
