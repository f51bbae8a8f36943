"""Dense single-device attention over packed documents: the truth that distributed attention is compared with."""

import torch


def dense_attention(q_THD, k_TGD, v_TGD, lengths, window=0, softcap=0.0):
    """softmax(q k^T / sqrt(D)) v within each document, causal, with a full mask and no tricks: (T, H, D)."""
    heads = q_THD.shape[1] // k_TGD.shape[1]
    k_THD, v_THD = (x.repeat_interleave(heads, 1) for x in (k_TGD, v_TGD))
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.as_tensor(lengths))
    position = torch.arange(len(document))
    allowed = (document[:, None] == document) & (position[:, None] >= position)
    if window:
        allowed &= position[:, None] - position < window
    scores = torch.einsum("qhd,khd->hqk", q_THD, k_THD) * q_THD.shape[-1] ** -0.5
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v_THD)


def relative_error(a, b):
    """|a - b| / |b| in the 2-norm; where b is nothing (a softmax over one key has no gradient), |a - b|."""
    size = float(b.double().norm())
    return float((a.double() - b.double()).norm()) / (size if size > 1e-9 else 1.0)
