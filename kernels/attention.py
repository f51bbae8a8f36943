"""Core attention of a task list, forward and backward: the only file of this folder that others import.

It checks what comes in once, refuses what the chosen back end cannot compute exactly, and hands over. What the results
mean, and what is promised about them, is at the top of `reference.py`.
"""

# Shape suffixes: S query rows and C key rows on a server, H query heads, G key/value heads, D head size.

import torch

from distca.errors import Unsupported
from distca.kernels.capability import refusal
from distca.kernels.flash import attend_backward_flash, attend_flash
from distca.kernels.merge import statistics_dtype
from distca.kernels.reference import attend_backward_reference, attend_reference
from distca.kernels.torch_blocks import attend_backward_torch, attend_torch
from distca.kernels.triton_attention import attend_backward_triton, attend_triton
from distca.masks import Bands

BACKENDS = {
    "reference": (attend_reference, attend_backward_reference),
    "torch": (attend_torch, attend_backward_torch),
    "triton": (attend_triton, attend_backward_triton),
    "flash": (attend_flash, attend_backward_flash),
}


@torch.no_grad()
def attend(
    q_SHD: torch.Tensor,
    k_CGD: torch.Tensor,
    v_CGD: torch.Tensor,
    tasks: Bands,
    *,
    scale: float,
    softcap: float = 0.0,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out_SHD in the inputs' dtype and lse_SH in the statistics dtype; autograd does not see it."""
    _check_inputs(q_SHD, k_CGD, v_CGD, tasks, scale, softcap)
    _check_capability(q_SHD, softcap, backend)
    forward, _ = BACKENDS[backend]
    return forward(q_SHD, k_CGD, v_CGD, tasks, scale=scale, softcap=softcap)


@torch.no_grad()
def attend_backward(
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
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq_SHD, dk_CGD, dv_CGD: these tasks' share of the gradients, given the final lse and delta of their rows."""
    _check_inputs(q_SHD, k_CGD, v_CGD, tasks, scale, softcap)
    _check_like_q(q_SHD, lse_SH, delta_SH, d_out_SHD)
    _check_capability(q_SHD, softcap, backend)
    _, backward = BACKENDS[backend]
    return backward(q_SHD, k_CGD, v_CGD, lse_SH, delta_SH, d_out_SHD, tasks, scale=scale, softcap=softcap)


def _check_inputs(
    q_SHD: torch.Tensor, k_CGD: torch.Tensor, v_CGD: torch.Tensor, tasks: Bands, scale: float, softcap: float
) -> None:
    assert scale > 0 and softcap >= 0, (
        f"scale {scale}, softcap {softcap}: want a positive scale, and no negative softcap"
    )
    assert q_SHD.ndim == k_CGD.ndim == 3, (
        f"q {tuple(q_SHD.shape)}, k {tuple(k_CGD.shape)}: want (rows, heads, head size)"
    )
    (num_rows, num_heads, head_dim), (num_keys, num_groups, _) = q_SHD.shape, k_CGD.shape
    assert k_CGD.shape == v_CGD.shape == (num_keys, num_groups, head_dim), (
        f"q {tuple(q_SHD.shape)}, k {tuple(k_CGD.shape)}, v {tuple(v_CGD.shape)}: head sizes or key rows differ"
    )
    assert num_heads % num_groups == 0, f"{num_heads} query heads cannot share {num_groups} key/value heads evenly"
    for name, x in ("k", k_CGD), ("v", v_CGD):
        assert (x.dtype, x.device) == (q_SHD.dtype, q_SHD.device), f"{name} is {x.dtype} on {x.device}, q is not"
    for name, x in ("q", q_SHD), ("k", k_CGD), ("v", v_CGD):
        assert x.is_contiguous(), f"{name} has strides {x.stride()}: want contiguous rows"
    bad = (tasks.q0 < 0) | (tasks.q1 < tasks.q0) | (tasks.q1 > num_rows)
    bad |= (tasks.k0 < 0) | (tasks.k1 < tasks.k0) | (tasks.k1 > num_keys)
    assert not bad.any(), f"tasks outside of {num_rows} rows x {num_keys} keys: {tasks[bad].rows()[:3]}"


def _check_like_q(q_SHD: torch.Tensor, lse_SH: torch.Tensor, delta_SH: torch.Tensor, d_out_SHD: torch.Tensor) -> None:
    stats = statistics_dtype(q_SHD.dtype)
    wanted = ("lse", lse_SH, q_SHD.shape[:2], stats), ("delta", delta_SH, q_SHD.shape[:2], stats)
    for name, x, shape, dtype in (*wanted, ("d_out", d_out_SHD, q_SHD.shape, q_SHD.dtype)):
        found, want = (x.shape, x.dtype, x.device), (shape, dtype, q_SHD.device)
        assert found == want, f"{name} is {found}, want {want}"
        assert x.is_contiguous(), f"{name} has strides {x.stride()}: want contiguous rows"


def _check_capability(q_SHD: torch.Tensor, softcap: float, backend: str) -> None:
    sentence = refusal(
        backend, head_dim=q_SHD.shape[-1], dtype=q_SHD.dtype, softcap=softcap, device_type=q_SHD.device.type
    )
    if sentence:
        raise Unsupported(sentence)
