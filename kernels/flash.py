"""How is a task list computed by FlashAttention 2? Back end "flash": the variable-length operator inside PyTorch.

One call of the operator takes sequences, each some rows and some keys side by side, and one mask for all of them, drawn
from the corner where a sequence's last row meets its last key:

    row i of n sees key j of m  where  -left <= j - i - (m - n) <= right,  and -1 stands for no bound

`calls_of` brings any task list into this form. A band is cut where its right diagonal meets its last key: the rows
above end on the diagonal (right = 0), the rows below see the last key (right = -1). Documents under one rule then need
one call or two, whatever their lengths and cuts.

Promises: those of the reference, which has the same signatures. Equal calls give an equal out and lse. Gradients are
added up with atomics, so their last bits change from call to call, unless `torch.use_deterministic_algorithms(True)`.
The operator's backward wants `out` only for delta, so it gets `out_with_delta`, whose rounding moves delta by at most
half a unit in its last place; the true `out`, rounded likewise, may move it further.
"""

# Shape suffixes: S query rows and C key rows on a server, P query rows and N key rows of a call, H query heads, G
# key/value heads, D head size.

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from distca.arrays import ranges
from distca.kernels.delta import out_with_delta
from distca.kernels.merge import merge, statistics_dtype
from distca.kernels.rows import placed
from distca.masks import Bands, cut, tighten

KEYS_PER_CALL = 1 << 17  # keys are copied for each sequence that sees them, in backward for each query head too


@dataclass(frozen=True, slots=True)
class Call:
    """Sequences for one call of the operator. Every row of them sees at least one key."""

    sequences: Bands
    left: int
    right: int
    nth: np.ndarray  # (P,) how many sequences, of all calls, have had this row before

    def rows(self) -> np.ndarray:
        """(P,) the query row, of all on the server, that each row of the call is."""
        return ranges(self.sequences.q0, self.sequences.q1 - self.sequences.q0)

    def keys(self) -> np.ndarray:
        """(N,) likewise for its keys."""
        return ranges(self.sequences.k0, self.sequences.k1 - self.sequences.k0)

    def layout(self, device: torch.device) -> dict[str, Any]:
        """The operator's arguments that say which rows and keys are a sequence."""
        s = self.sequences
        most_q, most_k = int((s.q1 - s.q0).max()), int((s.k1 - s.k0).max())
        return dict(
            cum_seq_q=placed(_ends(s.q1 - s.q0), device),
            cum_seq_k=placed(_ends(s.k1 - s.k0), device),
            max_q=max(most_q, 2),  # for single rows the operator has a path of its own, with keys split
            max_k=most_k,
        )

    def mask(self) -> dict[str, Any]:
        """The operator's arguments that say which keys a row sees."""
        causal = (self.left, self.right) == (-1, 0)
        return dict(is_causal=causal, window_size_left=self.left, window_size_right=self.right)


def attend_flash(
    q_SHD: torch.Tensor,
    k_CGD: torch.Tensor,
    v_CGD: torch.Tensor,
    tasks: Bands,
    *,
    scale: float,
    softcap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out_SHD in the inputs' dtype, and lse_SH in the statistics dtype."""
    assert not softcap, "kernels/capability.py refuses softcap for this back end"
    stats, device, calls = statistics_dtype(q_SHD.dtype), q_SHD.device, list(calls_of(tasks))
    rounds = max((int(call.nth.max()) + 1 for call in calls), default=0)
    out_SHD = torch.zeros_like(q_SHD, dtype=stats if rounds > 1 else q_SHD.dtype)
    lse_SH = torch.full(q_SHD.shape[:2], -torch.inf, dtype=stats, device=device)
    parts = [_forward(q_SHD, k_CGD, v_CGD, call, scale) for call in calls]
    for n in range(rounds):  # in each of them a row has one part at most
        for call, (part_PHD, lse_PH) in zip(calls, parts, strict=True):
            at = np.flatnonzero(call.nth == n)
            rows, at = (placed(x, device) for x in (call.rows()[at], at))
            new = part_PHD[at].to(out_SHD.dtype), lse_PH[at]
            out_SHD[rows], lse_SH[rows] = merge(out_SHD[rows], lse_SH[rows], *new) if n else new
    return out_SHD.to(q_SHD.dtype), lse_SH


def attend_backward_flash(
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
    assert not softcap, "kernels/capability.py refuses softcap for this back end"
    dtype, stats, device = q_SHD.dtype, statistics_dtype(q_SHD.dtype), q_SHD.device
    dq_SHD, dk_CGD, dv_CGD = (torch.zeros_like(x, dtype=stats) for x in (q_SHD, k_CGD, v_CGD))
    out_SHD = out_with_delta(d_out_SHD, delta_SH)
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=device)  # seed and offset, never read
    for call in calls_of(tasks):
        rows, keys = (placed(x, device) for x in (call.rows(), call.keys()))
        dq_PHD, dk_NGD, dv_NGD = torch.ops.aten._flash_attention_backward(
            d_out_SHD[rows],
            q_SHD[rows],
            k_CGD[keys],
            v_CGD[keys],
            out_SHD[rows],
            lse_SH[rows].T.contiguous(),
            **call.layout(device),
            dropout_p=0.0,
            rng_state=no_dropout,
            unused=no_dropout,
            scale=scale,
            **call.mask(),
        )
        dq_SHD.index_add_(0, rows, dq_PHD.to(stats))
        dk_CGD.index_add_(0, keys, dk_NGD.to(stats))
        dv_CGD.index_add_(0, keys, dv_NGD.to(stats))
    return dq_SHD.to(dtype), dk_CGD.to(dtype), dv_CGD.to(dtype)


def calls_of(tasks: Bands) -> Iterator[Call]:
    """The tasks' pairs, each in one sequence of one call per task that holds it. A row's `nth` counts in list order."""
    parts, left, right = _sequences(tasks)
    lengths = parts.q1 - parts.q0
    nth, ends = _occurrence(ranges(parts.q0, parts.q1 - parts.q0)), np.cumsum(lengths)
    for mask in np.unique(np.stack([left, right], 1), axis=0).tolist():
        alike = np.flatnonzero((left == mask[0]) & (right == mask[1]))
        size = np.maximum(parts.k1 - parts.k0, 4)[alike]  # 4, so that a call never has more than 65,535 sequences
        chunk = (np.cumsum(size) - size) // KEYS_PER_CALL
        for at in np.split(alike, np.flatnonzero(np.diff(chunk)) + 1):
            yield Call(parts[at], *mask, nth[ranges(ends[at] - lengths[at], lengths[at])])


def _sequences(tasks: Bands) -> tuple[Bands, np.ndarray, np.ndarray]:
    """Bands of one mask each, in list order, and how far their rows look left and right of the corner's diagonal."""
    b = tighten(tasks)
    keys = b.k1 - b.k0
    meet = b.q0 + np.where(b.hi < keys - 1, keys - b.hi, 0)  # first row that sees the last key, the one before aside
    above, below = cut(b, b.q0, meet, b.k0, b.k1), cut(b, meet, b.q1, b.k0, b.k1)
    parts = Bands(*(np.stack([getattr(x, f.name) for x in (above, below)], 1).ravel() for f in fields(Bands)))
    parts = parts[parts.q1 > parts.q0]
    rows, keys = parts.q1 - parts.q0, parts.k1 - parts.k0
    left = np.where(parts.lo > 1 - rows, keys - rows - parts.lo, -1)
    right = np.where(parts.hi < keys - 1, 0, -1)
    return parts, left, right


def _forward(
    q_SHD: torch.Tensor, k_CGD: torch.Tensor, v_CGD: torch.Tensor, call: Call, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """out_PHD and lse_PH of a call's rows."""
    device = q_SHD.device
    rows, keys = (placed(x, device) for x in (call.rows(), call.keys()))
    out_PHD, lse_HP, *_ = torch.ops.aten._flash_attention_forward(
        q_SHD[rows],
        k_CGD[keys],
        v_CGD[keys],
        **call.layout(device),
        dropout_p=0.0,
        return_debug_mask=False,
        scale=scale,
        **call.mask(),
    )
    return out_PHD, lse_HP.T


def _ends(lengths: np.ndarray) -> np.ndarray:
    """[3, 2] -> [0, 3, 5], int32."""
    return np.append(0, np.cumsum(lengths)).astype(np.int32)


def _occurrence(x: np.ndarray) -> np.ndarray:
    """[7, 4, 7, 7] -> [0, 0, 1, 2]: how often an entry's value has been there before."""
    order = np.argsort(x, kind="stable")
    _, first, counts = np.unique(x[order], return_index=True, return_counts=True)
    found = np.empty(len(x), np.int64)
    found[order] = np.arange(len(x)) - np.repeat(first, counts)
    return found
