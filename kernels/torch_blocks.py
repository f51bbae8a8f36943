"""How is a task list computed fast with nothing but PyTorch? Back end "torch", for CPUs and GPUs without Triton.

Every task is split into tiles that PyTorch's fused attention operators can do without ever holding rows x keys scores:

    full     every row sees every key; no mask
    causal   row i sees the keys up to i; the operator's own flag, which skips most of what lies beyond
    masked   anything else, in at most `MASKED_PAIRS` pairs, with a mask of that size

A large causal shard is a full tile and a causal one. A large window is taken `EDGE_ROWS` rows at a time, each with a
masked left edge, a full middle and a causal right edge.

An operator call costs as much as the attention of a short document, so short causal documents are attended many at a
time, side by side in the operator's batch dimension: equal ones that lie end to end as they lie, others gathered by
length, padded to a multiple of `LENGTH_STEP`. Under a causal mask padding is seen by padding only, so it needs no mask.

Promises: those of the reference, which has the same signatures; equal calls give equal bits, on CUDA too; and a
document that no other task touches has the same bits in any place and whatever lies beside it, for one number of
threads. Nothing is promised across cuts: a row's tiles are counted from the first row and key of its task.
"""

# Shape suffixes: S query rows and C key rows on a server, B tiles of a batch, Q query rows and K key rows of a tile, H
# query heads, G key/value heads, R query heads per key/value head (H = G * R), D head size. Heads are shared by the
# operators or through stride 0, never copied.

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from distca.arrays import spread
from distca.kernels.delta import out_with_delta
from distca.kernels.merge import merge, statistics_dtype
from distca.masks import Bands, cut, tighten

EDGE_ROWS = 512  # rows of a left edge: its mask is at most EDGE_ROWS^2
MASKED_PAIRS = EDGE_ROWS**2  # below this a mask costs less than a second call and a merge
SHORT_ROWS = 64  # a longer document is worth a call of its own
LENGTH_STEP = 8  # lengths that differ by less share a call; the length alone decides, so neighbours change no bit
RUN = 8  # so many equal documents end to end are worth a call of their own, which spares gathering them


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


@dataclass(frozen=True, slots=True)
class Stripe:
    """Rows [first, first + count * size) as `count` tiles of `size`: views."""

    first: int
    size: int
    count: int = 1

    def take(self, x_S: torch.Tensor, padding: float | None = None) -> torch.Tensor:
        """(S, ...) -> (B, size, ...)."""
        return x_S[self.first : self.first + self.count * self.size].unflatten(0, (self.count, self.size))

    def put(self, x_S: torch.Tensor, part_BQ: torch.Tensor) -> None:
        self.take(x_S).copy_(part_BQ)


@dataclass(frozen=True, slots=True)
class Padded:
    """Tiles of unequal lengths, padded with their last row: copies."""

    rows: torch.Tensor  # (B, size) int64
    real: torch.Tensor  # (rows without padding,) int64, places in `rows` flattened

    @staticmethod
    def of(first: np.ndarray, lengths: np.ndarray, size: int) -> Padded:
        nth = np.arange(size)
        rows = first[:, None] + np.minimum(nth, lengths[:, None] - 1)
        return Padded(torch.from_numpy(rows), torch.from_numpy(np.flatnonzero(nth < lengths[:, None])))

    def take(self, x_S: torch.Tensor, padding: float | None = None) -> torch.Tensor:
        """(S, ...) -> (B, size, ...); `padding` is what padding holds, None for the tile's last row."""
        taken_P = x_S.index_select(0, self.rows.flatten())
        if padding is not None:
            real_P = torch.zeros(len(taken_P), dtype=torch.bool).index_fill_(0, self.real, True)
            taken_P[~real_P] = padding
        return taken_P.unflatten(0, self.rows.shape)

    def put(self, x_S: torch.Tensor, part_BQ: torch.Tensor) -> None:
        part_P = part_BQ.flatten(0, 1).index_select(0, self.real)
        x_S.index_copy_(0, self.rows.flatten()[self.real], part_P.to(x_S.dtype))


@dataclass(frozen=True, slots=True)
class Batch:
    """Tiles for one operator call. Only a batch of one tile shares rows or keys with other batches."""

    rows: Stripe | Padded
    keys: Stripe | Padded
    tile: Tile
    """The mask, and the size with padding."""
    has_own_rows: bool = True
    has_own_keys: bool = True


@dataclass(frozen=True, slots=True)
class Batches:
    """All of a task list, in an order that keeps that of tiles which share rows or keys."""

    batches: list[Batch]
    all_rows: bool
    """Every query row is in a tile."""
    all_keys: bool

    @property
    def is_whole(self) -> bool:
        """One call's results are all results, in their order: no copy is needed."""
        first = self.batches[0] if len(self.batches) == 1 else None
        return first is not None and isinstance(first.rows, Stripe) and self.all_rows and self.all_keys


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
    work, stats = batches_of(tasks, len(q_SHD), len(k_CGD), q_SHD.device.type == "cpu"), statistics_dtype(q_SHD.dtype)
    merges = not all(batch.has_own_rows for batch in work.batches)
    out_SHD = torch.empty_like(q_SHD, dtype=stats if merges else None)
    lse_SH = torch.empty(q_SHD.shape[:2], dtype=stats, device=q_SHD.device)
    if merges or not work.all_rows:
        out_SHD.zero_()
        lse_SH.fill_(-torch.inf)
    has_part = np.zeros(len(q_SHD) if merges else 0, bool)  # (S,) which rows a tile has reached
    for batch in work.batches:
        q_BHQD, k_BGKD, v_BGKD = (
            at.take(x).transpose(1, 2) for at, x in ((batch.rows, q_SHD), (batch.keys, k_CGD), (batch.keys, v_CGD))
        )
        part, part_lse = (x.transpose(1, 2) for x in _forward(q_BHQD, k_BGKD, v_BGKD, batch.tile, scale))
        if work.is_whole:
            return part.flatten(0, 1).contiguous(), part_lse.flatten(0, 1).contiguous()
        if not batch.has_own_rows:
            reached = has_part[batch.tile.q0 : batch.tile.q1]
            if reached.any():
                part, part_lse = merge(batch.rows.take(out_SHD), batch.rows.take(lse_SH), part.to(stats), part_lse)
            reached[:] = True
        batch.rows.put(out_SHD, part)
        batch.rows.put(lse_SH, part_lse)
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
    dtype, stats = q_SHD.dtype, statistics_dtype(q_SHD.dtype)
    work = batches_of(tasks, len(q_SHD), len(k_CGD), q_SHD.device.type == "cpu")
    if q_SHD.device.type == "cpu" and not _has_units_for(dtype):  # without them its 16-bit backward takes 8 times
        q_SHD, k_CGD, v_CGD, d_out_SHD = (x.to(stats) for x in (q_SHD, k_CGD, v_CGD, d_out_SHD))
    by_rows = (d_out_SHD, q_SHD, out_with_delta(d_out_SHD, delta_SH))
    dq_SHD = (torch.empty_like if _is_written(work, rows=True) else torch.zeros_like)(q_SHD, dtype=stats)
    new_keys = torch.empty_like if _is_written(work, rows=False) else torch.zeros_like
    dk_CGD, dv_CGD = (new_keys(x, dtype=stats) for x in (k_CGD, v_CGD))
    for batch in work.batches:
        do_BHQD, q_BHQD, out_BHQD = (batch.rows.take(x).transpose(1, 2) for x in by_rows)
        lse_BHQ = batch.rows.take(lse_SH, padding=torch.inf).transpose(1, 2)  # all weights of padding are 0
        k_BGKD, v_BGKD = (batch.keys.take(x).transpose(1, 2) for x in (k_CGD, v_CGD))
        parts = _backward(do_BHQD, q_BHQD, k_BGKD, v_BGKD, out_BHQD, lse_BHQ, batch.tile, scale)
        if work.is_whole:
            return tuple(x.transpose(1, 2).flatten(0, 1).to(dtype).contiguous() for x in parts)
        rows, keys = (batch.rows, batch.has_own_rows), (batch.keys, batch.has_own_keys)
        for (at, is_own), whole, part in zip((rows, keys, keys), (dq_SHD, dk_CGD, dv_CGD), parts, strict=True):
            if is_own:
                at.put(whole, part.transpose(1, 2))
            else:
                at.take(whole).add_(part.transpose(1, 2))
    return dq_SHD.to(dtype), dk_CGD.to(dtype), dv_CGD.to(dtype)


def _has_units_for(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of the dtype as they are, faster than in float32."""
    return dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported()


def _is_written(work: Batches, rows: bool) -> bool:
    """Every row, or every key, is written by one batch: nothing is added up."""
    own = (batch.has_own_rows if rows else batch.has_own_keys for batch in work.batches)
    return (work.all_rows if rows else work.all_keys) and all(own)


def batches_of(tasks: Bands, num_rows: int, num_keys: int, batched: bool) -> Batches:
    """Which tiles share an operator call; with `batched` = False none does."""
    return _batches_of(tasks.to_bytes(), num_rows, num_keys, batched)


@lru_cache(maxsize=64)  # a micro-batch's layers share their tasks
def _batches_of(tasks: bytes, num_rows: int, num_keys: int, batched: bool) -> Batches:
    bands = tighten(Bands.from_bytes(tasks))
    bands = bands[bands.q1 > bands.q0]
    lengths = bands.q1 - bands.q0
    is_short = (lengths <= SHORT_ROWS) & (bands.k1 - bands.k0 == lengths) & (bands.hi == 0) & (bands.lo <= 1 - lengths)
    is_short &= batched & _own(bands.q0, bands.q1, num_rows) & _own(bands.k0, bands.k1, num_keys)
    short, rest = bands[is_short], list(tiles(bands[~is_short]))
    q0, q1, k0, k1 = np.array([tile[:4] for tile in rest], np.int64).reshape(-1, 4).T
    own = zip(_own(q0, q1, num_rows).tolist(), _own(k0, k1, num_keys).tolist(), strict=True)
    singles = [
        Batch(Stripe(t.q0, t.q1 - t.q0), Stripe(t.k0, t.k1 - t.k0), t, *o) for t, o in zip(rest, own, strict=True)
    ]
    short_rows = int((short.q1 - short.q0).sum())  # no other tile has them
    return Batches(
        [*_short_batches(short), *singles],
        all_rows=short_rows + np.count_nonzero(_visits(q0, q1, num_rows)) == num_rows,
        all_keys=short_rows + np.count_nonzero(_visits(k0, k1, num_keys)) == num_keys,
    )


def _short_batches(bands: Bands) -> Iterator[Batch]:
    """Causal documents of at most `SHORT_ROWS` rows."""
    bands = bands[np.lexsort((bands.q0, bands.q1 - bands.q0))]
    lengths = bands.q1 - bands.q0
    goes_on = (np.diff(lengths) == 0) & (bands.q0[1:] == bands.q1[:-1]) & (bands.k0[1:] == bands.k1[:-1])
    first = np.append(0, 1 + np.flatnonzero(~goes_on))[: len(bands)]
    counts = np.diff(np.append(first, len(bands)))
    is_run = (counts >= RUN) & (lengths[first] % LENGTH_STEP == 0)
    for at, count in zip(first[is_run].tolist(), counts[is_run].tolist(), strict=True):
        size, q0, k0 = (int(x[at]) for x in (lengths, bands.q0, bands.k0))
        yield Batch(Stripe(q0, size, count), Stripe(k0, size, count), _causal_tile(size))
    run, _ = spread(counts)
    bands = bands[~is_run[run]]
    lengths = bands.q1 - bands.q0
    step = -(-lengths // LENGTH_STEP)
    for alike in np.split(np.arange(len(bands)), np.flatnonzero(np.diff(step)) + 1) if len(bands) else ():
        size = int(step[alike[0]]) * LENGTH_STEP
        rows, keys = (Padded.of(x[alike], lengths[alike], size) for x in (bands.q0, bands.k0))
        yield Batch(rows, keys, _causal_tile(size))


def _causal_tile(size: int) -> Tile:
    return Tile(0, size, 0, size, -size, 0)


def _visits(first: np.ndarray, last: np.ndarray, size: int) -> np.ndarray:
    """(size,) how many of the ranges [first, last) each number is in."""
    change = np.bincount(first, minlength=size + 1) - np.bincount(last, minlength=size + 1)
    return np.cumsum(change)[:size]


def _own(first: np.ndarray, last: np.ndarray, size: int) -> np.ndarray:
    """Which of the ranges [first, last) meet no other."""
    shared = np.append(0, np.cumsum(_visits(first, last, size) > 1))
    return shared[last] == shared[first]


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


def _by_group(x_BH: torch.Tensor, num_groups: int) -> torch.Tensor:
    """(B, H, ...) -> (B * G, R, ...): with B = 1 a view."""
    return x_BH.unflatten(1, (num_groups, -1)).flatten(0, 1)


def _shared_by(x_BGKD: torch.Tensor, num_sharing: int) -> torch.Tensor:
    """(B, G, K, D) -> (B * G, R, K, D) with stride 0 along R: with B = 1 a view."""
    return x_BGKD.flatten(0, 1)[:, None].expand(-1, num_sharing, -1, -1)


def _mask(tile: Tile, like: torch.Tensor) -> torch.Tensor | None:
    """(B, H, Q, K) to add to the scores: 0 where the row sees the key, -inf elsewhere; one (Q, K) block in memory."""
    if not tile.needs_mask:
        return None
    rows, keys = tile.q1 - tile.q0, tile.k1 - tile.k0
    hidden = torch.full((rows, keys + -keys % 16), -torch.inf, dtype=like.dtype, device=like.device)  # CUDA wants 16
    mask_QK = hidden.triu(tile.hi + 1) if tile.has_right_edge else torch.zeros_like(hidden)
    if tile.has_left_edge:
        mask_QK += hidden.tril_(tile.lo - 1)
    return mask_QK[:, :keys].expand(*like.shape[:2], rows, keys)


def _forward(
    q_BHQD: torch.Tensor, k_BGKD: torch.Tensor, v_BGKD: torch.Tensor, tile: Tile, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """out_BHQD, lse_BHQ."""
    if q_BHQD.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q_BHQD, k_BGKD, v_BGKD, 0.0, tile.is_causal, attn_mask=_mask(tile, q_BHQD), scale=scale
        )
    num_batches, num_groups, num_sharing = *k_BGKD.shape[:2], q_BHQD.shape[1] // k_BGKD.shape[1]
    q, k, v = _by_group(q_BHQD, num_groups), _shared_by(k_BGKD, num_sharing), _shared_by(v_BGKD, num_sharing)
    out, lse, *_ = torch.ops.aten._efficient_attention_forward(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        _mask(tile, q),
        None,
        None,
        None,
        None,
        0.0,
        int(tile.is_causal),
        True,
        scale=scale,
    )
    lse = lse[..., : tile.q1 - tile.q0]  # the operator pads it to a multiple of 32
    return tuple(x.unflatten(0, (num_batches, num_groups)).flatten(1, 2) for x in (out.transpose(1, 2), lse))


def _backward(
    do_BHQD: torch.Tensor,
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    v_BGKD: torch.Tensor,
    out_BHQD: torch.Tensor,
    lse_BHQ: torch.Tensor,
    tile: Tile,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq_BHQD, dk_BGKD, dv_BGKD."""
    num_batches, num_groups, num_sharing = *k_BGKD.shape[:2], q_BHQD.shape[1] // k_BGKD.shape[1]
    on_cpu, num_units = q_BHQD.device.type == "cpu", num_batches * num_groups
    if on_cpu and (num_units % torch.get_num_threads() == 0 or num_units > 8 * torch.get_num_threads()):
        return _cpu_backward(do_BHQD, q_BHQD, k_BGKD, v_BGKD, out_BHQD, lse_BHQ, tile, scale)
    # the operator gives a thread all query heads that share a key: with few of those, heads are set apart and summed
    do, q, out, lse = (_by_group(x, num_groups) for x in (do_BHQD, q_BHQD, out_BHQD, lse_BHQ))
    k, v = _shared_by(k_BGKD, num_sharing), _shared_by(v_BGKD, num_sharing)
    dq, dk, dv = (_cpu_backward if on_cpu else _cuda_backward)(do, q, k, v, out, lse, tile, scale)
    stats = statistics_dtype(q.dtype)
    dk, dv = (x.sum(1, dtype=stats).unflatten(0, (num_batches, num_groups)) for x in (dk, dv))
    return dq.unflatten(0, (num_batches, num_groups)).flatten(1, 2), dk, dv


def _cpu_backward(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    tile: Tile,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        do, q, k, v, out, lse, 0.0, tile.is_causal, attn_mask=_mask(tile, q), scale=scale
    )


def _cuda_backward(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    tile: Tile,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    mask = _mask(tile, q)
    do, q, k, v, out = (x.transpose(1, 2) for x in (do, q, k, v, out))
    lse = F.pad(lse, (0, -lse.shape[-1] % 32), value=torch.inf)
    no_dropout = torch.zeros((), dtype=torch.int64, device=q.device)  # seed and offset, never read
    dq, dk, dv, _ = torch.ops.aten._efficient_attention_backward(
        do.contiguous(),
        q,
        k,
        v,
        mask,
        out.contiguous(),
        None,
        None,
        q.shape[1],
        k.shape[1],
        lse.contiguous(),
        0.0,
        no_dropout,
        no_dropout,
        int(tile.is_causal),
        False,
        scale=scale,
        num_splits_key=1,  # more would add to dq atomically: not the same bits twice
    )
    return tuple(x.transpose(1, 2) for x in (dq, dk, dv))
