"""What is the core attention of a task list, and what are its gradients? The truth that every back end is held to.

Plain dense PyTorch, one task at a time, on any device and in any dtype; arithmetic is in the statistics dtype (float64
for float64 inputs, else float32) and the results are cast to the dtype of the inputs.

  - A row that several tasks cover gets their merge in list order; gradients are sums in list order.
  - A row that sees no key has out = 0, lse = -inf and zero gradients. Nothing here is ever nan.
  - Backward takes the lse and delta = rowsum(d_out * out) of the row's FINAL output, over all servers. A list that
    holds only some of a row's keys then gives exactly their share of the gradients, and shares add up.
"""

# Shape suffixes: S query rows and C key rows on a server, Q query rows and K key rows of a task, H query heads,
# G key/value heads, R query heads per key/value head (H = G * R), D head size.

import torch

from distca.kernels.merge import merge, statistics_dtype
from distca.masks import Bands


def attend_reference(
    q_SHD: torch.Tensor,
    k_CGD: torch.Tensor,
    v_CGD: torch.Tensor,
    tasks: Bands,
    *,
    scale: float,
    softcap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out_SHD in the inputs' dtype, and lse_SH in the statistics dtype."""
    stats = statistics_dtype(q_SHD.dtype)
    out_SHD = torch.zeros_like(q_SHD, dtype=stats)
    lse_SH = torch.full(q_SHD.shape[:2], -torch.inf, dtype=stats, device=q_SHD.device)
    for q0, q1, k0, k1, lo, hi in tasks.rows():
        q_QGRD, k_KGD, v_KGD = _by_group(q_SHD[q0:q1], k_CGD, stats), k_CGD[k0:k1].to(stats), v_CGD[k0:k1].to(stats)
        s_GRQK, _ = _scores(q_QGRD, k_KGD, lo, hi, scale, softcap)
        lse_GRQ = s_GRQK.logsumexp(-1)
        part_QGRD = torch.einsum("grqk,kgd->qgrd", _weights(s_GRQK, lse_GRQ), v_KGD)
        part_lse_QH = lse_GRQ.permute(2, 0, 1).flatten(1)
        out_SHD[q0:q1], lse_SH[q0:q1] = merge(out_SHD[q0:q1], lse_SH[q0:q1], part_QGRD.flatten(1, 2), part_lse_QH)
    return out_SHD.to(q_SHD.dtype), lse_SH


def attend_backward_reference(
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
    """dq_SHD, dk_CGD, dv_CGD of these tasks, in the inputs' dtype. `lse_SH` and `delta_SH` are final: see above."""
    stats = statistics_dtype(q_SHD.dtype)
    dq_SHD, dk_CGD, dv_CGD = (torch.zeros_like(x, dtype=stats) for x in (q_SHD, k_CGD, v_CGD))
    for q0, q1, k0, k1, lo, hi in tasks.rows():
        k_KGD, v_KGD = k_CGD[k0:k1].to(stats), v_CGD[k0:k1].to(stats)
        q_QGRD, do_QGRD = _by_group(q_SHD[q0:q1], k_CGD, stats), _by_group(d_out_SHD[q0:q1], k_CGD, stats)
        lse_GRQ, delta_GRQ = (_by_group(x[q0:q1], k_CGD, stats).permute(1, 2, 0) for x in (lse_SH, delta_SH))
        s_GRQK, slope = _scores(q_QGRD, k_KGD, lo, hi, scale, softcap)
        p_GRQK = _weights(s_GRQK, lse_GRQ)
        dp_GRQK = torch.einsum("qgrd,kgd->grqk", do_QGRD, v_KGD)
        ds_GRQK = p_GRQK * (dp_GRQK - delta_GRQ[..., None]) * slope * scale
        dq_SHD[q0:q1] += torch.einsum("grqk,kgd->qgrd", ds_GRQK, k_KGD).flatten(1, 2)
        dk_CGD[k0:k1] += torch.einsum("grqk,qgrd->kgd", ds_GRQK, q_QGRD)
        dv_CGD[k0:k1] += torch.einsum("grqk,qgrd->kgd", p_GRQK, do_QGRD)
    return dq_SHD.to(q_SHD.dtype), dk_CGD.to(k_CGD.dtype), dv_CGD.to(v_CGD.dtype)


def _by_group(x_QH: torch.Tensor, k_CGD: torch.Tensor, stats: torch.dtype) -> torch.Tensor:
    """(Q, H, ...) -> (Q, G, R, ...): the R consecutive query heads that share a key/value head side by side."""
    return x_QH.to(stats).unflatten(1, (k_CGD.shape[1], -1))


def _scores(
    q_QGRD: torch.Tensor, k_KGD: torch.Tensor, lo: int, hi: int, scale: float, softcap: float
) -> tuple[torch.Tensor, torch.Tensor | float]:
    """s_GRQK, -inf where the band hides the key, and its slope ds / d(scale * q.k)."""
    s_GRQK, slope = torch.einsum("qgrd,kgd->grqk", q_QGRD, k_KGD) * scale, 1.0
    if softcap:
        bent_GRQK = (s_GRQK / softcap).tanh()
        s_GRQK, slope = softcap * bent_GRQK, 1.0 - bent_GRQK.square()
    row, key = (torch.arange(n, device=k_KGD.device) for n in (q_QGRD.shape[0], k_KGD.shape[0]))
    offset_QK = key[None, :] - row[:, None]
    return s_GRQK.masked_fill((offset_QK < lo) | (offset_QK > hi), -torch.inf), slope


def _weights(s_GRQK: torch.Tensor, lse_GRQ: torch.Tensor) -> torch.Tensor:
    """exp(s - lse), and 0 in a row that saw nothing, where both are -inf."""
    return (s_GRQK - lse_GRQ.masked_fill(lse_GRQ == -torch.inf, torch.inf)[..., None]).exp()
