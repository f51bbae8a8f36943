"""FlashAttention's variable-length operators, emulated on a CPU one sequence at a time, in any dtype.

They refuse what the operators inside PyTorch would refuse, and what those would silently get wrong."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from distca.kernels.capability import CAPABILITIES, FLOATS, Capability
from distca.kernels.merge import statistics_dtype

# Shape suffixes: P query rows and N key rows of a call, Q and K those of a sequence, H query heads, G key/value heads,
# D head size.


@contextmanager
def varlen_on_cpu() -> Iterator[None]:
    """Within, the back end "flash" exists on a CPU."""
    with torch.library._scoped_library("aten", "IMPL", "CPU") as library, pytest.MonkeyPatch.context() as patch:
        library.impl("_flash_attention_forward", _forward)
        library.impl("_flash_attention_backward", _backward)
        patch.setitem(CAPABILITIES, ("flash", "cpu"), Capability(FLOATS, softcap=False))
        yield


def _forward(
    q_PHD,
    k_NGD,
    v_NGD,
    cum_seq_q,
    cum_seq_k,
    max_q,
    max_k,
    dropout_p,
    is_causal,
    return_debug_mask,
    *,
    scale,
    window_size_left,
    window_size_right,
):
    assert not dropout_p and not return_debug_mask
    stats, sharing = statistics_dtype(q_PHD.dtype), q_PHD.shape[1] // k_NGD.shape[1]
    out_PHD = torch.full_like(q_PHD, torch.nan)
    lse_HP = torch.full((q_PHD.shape[1], len(q_PHD)), torch.nan, dtype=stats)
    for rows, keys in _sequences(cum_seq_q, cum_seq_k, max_q, max_k, q_PHD, k_NGD, v_NGD):
        k_KHD, v_KHD = (_shared(x[keys], sharing).to(stats) for x in (k_NGD, v_NGD))
        s_HQK = _scores(q_PHD[rows].to(stats), k_KHD, scale, is_causal, window_size_left, window_size_right)
        out_PHD[rows] = torch.einsum("hqk,khd->qhd", s_HQK.softmax(-1), v_KHD).to(q_PHD.dtype)
        lse_HP[:, rows] = s_HQK.logsumexp(-1)
    none = torch.empty(0)
    return out_PHD, lse_HP, none, none, none


def _backward(
    do_PHD,
    q_PHD,
    k_NGD,
    v_NGD,
    out_PHD,
    lse_HP,
    cum_seq_q,
    cum_seq_k,
    max_q,
    max_k,
    dropout_p,
    is_causal,
    rng_state,
    unused,
    *,
    scale,
    window_size_left,
    window_size_right,
):
    assert not dropout_p and lse_HP.shape == (q_PHD.shape[1], len(q_PHD)) and lse_HP.is_contiguous()
    assert do_PHD.shape == out_PHD.shape == q_PHD.shape and do_PHD.dtype == out_PHD.dtype == q_PHD.dtype
    stats, sharing = lse_HP.dtype, q_PHD.shape[1] // k_NGD.shape[1]
    dq_PHD, dk_NGD, dv_NGD = (torch.full_like(x, torch.nan) for x in (q_PHD, k_NGD, v_NGD))
    for rows, keys in _sequences(cum_seq_q, cum_seq_k, max_q, max_k, q_PHD, k_NGD, v_NGD):
        q_QHD, do_QHD, out_QHD = (x[rows].to(stats) for x in (q_PHD, do_PHD, out_PHD))
        k_KHD, v_KHD = (_shared(x[keys], sharing).to(stats) for x in (k_NGD, v_NGD))
        s_HQK = _scores(q_QHD, k_KHD, scale, is_causal, window_size_left, window_size_right)
        p_HQK = (s_HQK - lse_HP[:, rows, None]).exp()
        dp_HQK = torch.einsum("qhd,khd->hqk", do_QHD, v_KHD)
        ds_HQK = p_HQK * (dp_HQK - (do_QHD * out_QHD).sum(-1).T[..., None]) * scale
        dq_PHD[rows] = torch.einsum("hqk,khd->qhd", ds_HQK, k_KHD).to(q_PHD.dtype)
        dk_KHD, dv_KHD = (torch.einsum("hqk,qhd->khd", x, y) for x, y in ((ds_HQK, q_QHD), (p_HQK, do_QHD)))
        dk_NGD[keys], dv_NGD[keys] = (x.unflatten(1, (-1, sharing)).sum(2).to(q_PHD.dtype) for x in (dk_KHD, dv_KHD))
    return dq_PHD, dk_NGD, dv_NGD


def _sequences(cum_seq_q, cum_seq_k, max_q, max_k, q_PHD, k_NGD, v_NGD) -> Iterator[tuple[slice, slice]]:
    assert cum_seq_q.dtype == cum_seq_k.dtype == torch.int32 and len(cum_seq_q) == len(cum_seq_k) > 1
    assert len(cum_seq_q) <= 65536, "a sequence is a row of the launch, and there are no more"
    assert q_PHD.is_contiguous() and k_NGD.is_contiguous() and v_NGD.is_contiguous()
    q, k = cum_seq_q.tolist(), cum_seq_k.tolist()
    assert (q[0], q[-1], k[0], k[-1]) == (0, len(q_PHD), 0, len(k_NGD))
    for q0, q1, k0, k1 in zip(q, q[1:], k, k[1:], strict=False):
        assert 0 < q1 - q0 <= max_q and 0 < k1 - k0 <= max_k, "longer than announced: rows would be left out"
        yield slice(q0, q1), slice(k0, k1)


def _shared(x_KGD: torch.Tensor, sharing: int) -> torch.Tensor:
    return x_KGD.repeat_interleave(sharing, 1)


def _scores(q_QHD, k_KHD, scale, is_causal, left, right) -> torch.Tensor:
    """s_HQK, -inf where the key is further than `left` before or `right` after the last corner's diagonal."""
    assert is_causal == ((left, right) == (-1, 0)) and left >= -1 and right >= -1
    row, key = torch.arange(len(q_QHD))[:, None], torch.arange(len(k_KHD))[None, :]
    ahead = key - row - (len(k_KHD) - len(q_QHD))
    seen_QK = (ahead >= (-left if left >= 0 else ahead.min())) & (ahead <= (right if right >= 0 else ahead.max()))
    assert seen_QK.any(1).all(), "a row that sees nothing gets lse = +inf"
    return (torch.einsum("qhd,khd->hqk", q_QHD, k_KHD) * scale).masked_fill(~seen_QK, -torch.inf)
