"""How is a task list computed fast with nothing but PyTorch? Back end "torch", for CPUs and GPUs without Triton.

Every task is split into tiles that PyTorch's fused attention operators can do without ever holding rows x keys scores:

    full     every row sees every key; no mask
    causal   row i sees the keys up to i; the operator's own flag, which skips most of what lies beyond
    masked   anything else, in at most `MASKED_PAIRS` pairs, with a mask of that size

A large causal shard is a full tile and a causal one. A large window is taken `EDGE_ROWS` rows at a time, each with a
masked left edge, a full middle and a causal right edge.

Promises: those of the reference, which has the same signatures; and equal calls give equal bits, on CUDA too.
"""

# Shape suffixes: S query rows and C key rows on a server, Q query rows and K key rows of a tile, H query heads,
# G key/value heads, R query heads per key/value head (H = G * R), D head size. G is the operators' batch dimension, and
# keys and values are expanded over R with stride 0: shared heads are never copied.

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from distca.kernels.delta import out_with_delta
from distca.kernels.merge import merge, statistics_dtype
from distca.masks import Bands, cut, tighten

EDGE_ROWS = 512  # rows of a left edge: its mask is at most EDGE_ROWS^2
MASKED_PAIRS = EDGE_ROWS**2  # below this a mask costs less than a second call and a merge


class Tile(NamedTuple):
    """A band that needs one operator call. Every row of it sees at least one key."""

    q0: int
    q1: int
    k0: int
    k1: int
    lo: int
    hi: int

    @property
    def has_left_edge(self) -> bool:
        """Some row starts after the first key."""
        return self.lo > self.q0 - self.q1 + 1

    @property
    def has_right_edge(self) -> bool:
        """Some row ends before the last key."""
        return self.hi < self.k1 - self.k0 - 1

    @property
    def is_causal(self) -> bool:
        return self.has_right_edge and self.hi == 0 and not self.has_left_edge

    @property
    def needs_mask(self) -> bool:
        return self.has_left_edge or (self.has_right_edge and self.hi != 0)

    @property
    def num_pairs(self) -> int:
        return (self.q1 - self.q0) * (self.k1 - self.k0)


def attend_torch(
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
    stats, num_groups = statistics_dtype(q_SHD.dtype), k_CGD.shape[1]
    out_SHD = torch.zeros_like(q_SHD, dtype=stats)
    lse_SH = torch.full(q_SHD.shape[:2], -torch.inf, dtype=stats, device=q_SHD.device)
    q_GRSD, out_GRSD, lse_GRS = (_group_first(x, num_groups) for x in (q_SHD, out_SHD, lse_SH))
    k_GRCD, v_GRCD = (_shared_by(x, q_GRSD.shape[1]) for x in (k_CGD, v_CGD))
    has_part = np.zeros(len(q_SHD), bool)  # (S,) which rows a tile has reached
    for tile in tiles(tasks):
        rows, keys = slice(tile.q0, tile.q1), slice(tile.k0, tile.k1)
        part, part_lse = _forward(q_GRSD[:, :, rows], k_GRCD[:, :, keys], v_GRCD[:, :, keys], tile, scale)
        if has_part[rows].any():
            part, part_lse = merge(out_GRSD[:, :, rows], lse_GRS[:, :, rows], part.to(stats), part_lse)
        out_GRSD[:, :, rows], lse_GRS[:, :, rows], has_part[rows] = part, part_lse, True
    return out_SHD.to(q_SHD.dtype), lse_SH


def attend_backward_torch(
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
    dtype, stats, num_groups = q_SHD.dtype, statistics_dtype(q_SHD.dtype), k_CGD.shape[1]
    if q_SHD.device.type == "cpu":  # its bf16 backward takes as long as float32's on long documents, 4 times on short
        q_SHD, k_CGD, v_CGD, d_out_SHD = (x.to(stats) for x in (q_SHD, k_CGD, v_CGD, d_out_SHD))
    dq_SHD, dk_CGD, dv_CGD = (torch.zeros_like(x, dtype=stats) for x in (q_SHD, k_CGD, v_CGD))
    saved = (q_SHD, lse_SH, d_out_SHD, out_with_delta(d_out_SHD, delta_SH), dq_SHD)
    q_GRSD, lse_GRS, do_GRSD, out_GRSD, dq_GRSD = (_group_first(x, num_groups) for x in saved)
    k_GRCD, v_GRCD = (_shared_by(x, q_GRSD.shape[1]) for x in (k_CGD, v_CGD))
    for tile in tiles(tasks):
        rows, keys = slice(tile.q0, tile.q1), slice(tile.k0, tile.k1)
        dq_GRQD, dk_GRKD, dv_GRKD = _backward(
            q_GRSD[:, :, rows],
            k_GRCD[:, :, keys],
            v_GRCD[:, :, keys],
            lse_GRS[:, :, rows],
            out_GRSD[:, :, rows],
            do_GRSD[:, :, rows],
            tile,
            scale,
        )
        dq_GRSD[:, :, rows] += dq_GRQD
        dk_CGD[keys] += dk_GRKD.sum(1, dtype=stats).transpose(0, 1)
        dv_CGD[keys] += dv_GRKD.sum(1, dtype=stats).transpose(0, 1)
    return dq_SHD.to(dtype), dk_CGD.to(dtype), dv_CGD.to(dtype)


def tiles(tasks: Bands) -> Iterator[Tile]:
    """The tasks' tiles, in list order: disjoint, and together exactly the tasks' pairs."""
    for band in tighten(tasks).rows():
        yield from _split(Tile(*band))


def _split(band: Tile) -> Iterator[Tile]:
    """`band` is tight: each row sees a key, each key is seen, so lo <= 0 <= hi wherever they bite."""
    q0, q1, k0, k1, lo, hi = band
    if not band.num_pairs:
        return
    if not band.needs_mask or band.num_pairs <= MASKED_PAIRS:
        yield band
        return
    if band.has_left_edge and q1 - q0 > EDGE_ROWS:
        edges_q, edges_k = [*range(q0, q1, EDGE_ROWS), q1], [k0, k1]
    elif band.has_left_edge:
        edges_q, edges_k = [q0, q1], [k0, k0 + q1 - q0 - 1 + lo, k1]  # then every row has started
    else:
        edges_q, edges_k = [q0, q1], [k0, k0 + hi, k1]  # until then no row has ended
    for top, bottom in zip(edges_q, edges_q[1:], strict=False):
        for left, right in zip(edges_k, edges_k[1:], strict=False):
            yield from _split(Tile(*cut(Bands.of(band), top, bottom, left, right).rows()[0]))


def _group_first(x_SH: torch.Tensor, num_groups: int) -> torch.Tensor:
    """A view: (S, H, ...) -> (G, R, S, ...)."""
    return x_SH.unflatten(1, (num_groups, -1)).movedim(0, 2)


def _shared_by(x_CGD: torch.Tensor, num_sharing: int) -> torch.Tensor:
    """A view: (C, G, D) -> (G, R, C, D) with stride 0 along R."""
    return x_CGD.transpose(0, 1)[:, None].expand(-1, num_sharing, -1, -1)


def _mask(tile: Tile, like: torch.Tensor) -> torch.Tensor | None:
    """(G, R, Q, K) to add to the scores: 0 where the row sees the key, -inf elsewhere; one (Q, K) block in memory."""
    if not tile.needs_mask:
        return None
    rows, keys = tile.q1 - tile.q0, tile.k1 - tile.k0
    hidden = torch.full((rows, keys + -keys % 16), -torch.inf, dtype=like.dtype, device=like.device)  # CUDA wants 16
    mask_QK = hidden.triu(tile.hi + 1) if tile.has_right_edge else torch.zeros_like(hidden)
    if tile.has_left_edge:
        mask_QK += hidden.tril_(tile.lo - 1)
    return mask_QK[:, :keys].expand(*like.shape[:2], rows, keys)


def _forward(
    q_GRQD: torch.Tensor, k_GRKD: torch.Tensor, v_GRKD: torch.Tensor, tile: Tile, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    mask = _mask(tile, q_GRQD)
    if q_GRQD.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q_GRQD, k_GRKD, v_GRKD, 0.0, tile.is_causal, attn_mask=mask, scale=scale
        )
    q_GQRD, k_GKRD, v_GKRD = (x.transpose(1, 2) for x in (q_GRQD, k_GRKD, v_GRKD))
    out_GQRD, lse_GRQ, *_ = torch.ops.aten._efficient_attention_forward(
        q_GQRD, k_GKRD, v_GKRD, mask, None, None, None, None, 0.0, int(tile.is_causal), True, scale=scale
    )
    return out_GQRD.transpose(1, 2), lse_GRQ[..., : tile.q1 - tile.q0]  # the operator pads lse to a multiple of 32


def _backward(
    q_GRQD: torch.Tensor,
    k_GRKD: torch.Tensor,
    v_GRKD: torch.Tensor,
    lse_GRQ: torch.Tensor,
    out_GRQD: torch.Tensor,
    do_GRQD: torch.Tensor,
    tile: Tile,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq_GRQD, dk_GRKD, dv_GRKD: the heads that share a key still apart."""
    mask = _mask(tile, q_GRQD)
    if q_GRQD.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            do_GRQD, q_GRQD, k_GRKD, v_GRKD, out_GRQD, lse_GRQ, 0.0, tile.is_causal, attn_mask=mask, scale=scale
        )
    do_GQRD, q_GQRD, k_GKRD, v_GKRD, out_GQRD = (x.transpose(1, 2) for x in (do_GRQD, q_GRQD, k_GRKD, v_GRKD, out_GRQD))
    lse_GRQ = F.pad(lse_GRQ, (0, -lse_GRQ.shape[-1] % 32), value=torch.inf)
    no_dropout = torch.zeros((), dtype=torch.int64, device=q_GRQD.device)  # seed and offset, never read
    dq_GQRD, dk_GKRD, dv_GKRD, _ = torch.ops.aten._efficient_attention_backward(
        do_GQRD.contiguous(),
        q_GQRD,
        k_GKRD,
        v_GKRD,
        mask,
        out_GQRD.contiguous(),
        None,
        None,
        q_GQRD.shape[1],
        k_GKRD.shape[1],
        lse_GRQ.contiguous(),
        0.0,
        no_dropout,
        no_dropout,
        int(tile.is_causal),
        False,
        scale=scale,
        num_splits_key=1,  # more would add to dq atomically: not the same bits twice
    )
    return tuple(x.transpose(1, 2) for x in (dq_GQRD, dk_GKRD, dv_GKRD))
