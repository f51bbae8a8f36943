"""Which blocks of keys does every tile of query rows attend, and in which order do tiles start?

A decision from integers alone. A kernel program takes one *item*: a tile of `tile` query rows under one key/value head.
It walks over the item's *entries*, each a run of key blocks under one band, with a single softmax state, so a row that
many tasks cover needs no merging:

    item    the tile's first row, key/value head, its first entry, its number of blocks
    entry   shift, end:      the item's n-th block is block n + shift of the keys, while n < end
            row0, row1       the entry is about these rows of the tile only,
            key0, key1       and these keys,
            lo, hi           and row q sees key k where  lo <= k - q <= hi

All rows and keys are those of the packed buffers; tiles and blocks lie on multiples of their size in them.
The same list for the transposed tasks (`masks.transpose`) names the query blocks that every tile of keys is seen by.

Promises:
  - Each pair of the tasks lies in exactly one (entry, block) per task that holds it; entries of a tile are in the
    order of their diagonals, then of their keys. So the blocks in which a row sees keys, and their order, do not
    depend on where the tasks are cut along their rows or how they are listed, if no pair is in two of them. (A block
    in which a row sees none changes no bit of its results.)
  - Short documents share the items of their tile: n of them are n entries, each with the block it lies in. They may
    start at any row.
  - Every tile of the buffer has its items, also those that no task touches: kernels write all of their output.
  - Items with most blocks come first: handed out in this order to whoever is free, the work ends within one item of
    the ideal. Among items of nearly equal size, those that read the same keys are neighbours, for the L2 cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from distca.arrays import order_by, spread
from distca.masks import Bands, tighten

FAR = 1 << 30  # beyond every buffer, and sums of it with a row number still fit an int32
BUCKETS_PER_OCTAVE = 4  # items within 19 % of each other count as equally large


@dataclass(frozen=True, slots=True)
class WorkList:
    """What one launch does: item p // heads_per_group is program p's."""

    items: np.ndarray  # (N, 4) int32: row, group, first entry, blocks
    entries: np.ndarray  # (E, 8) int32: shift, end, row0, row1, key0, key1, lo, hi

    def num_blocks(self) -> int:
        """Blocks over all items: what the launch costs, besides its items."""
        return int(self.items[:, 3].sum(dtype=np.int64))


def work_list(tasks: Bands, num_rows: int, num_groups: int, tile: int, block: int) -> WorkList:
    """The items of all tiles of `num_rows` packed rows, for `num_groups` key/value heads,
    with blocks of `block` keys."""
    b = tighten(tasks)
    b = b[b.q1 > b.q0]
    assert max(num_rows, int(b.k1.max(initial=0))) < FAR, "more rows or keys on one server than an int32 counts"
    diagonal = b.k0 - b.q0
    lo, hi = (np.clip(x + diagonal, -FAR, FAR) for x in (b.lo, b.hi))

    band, n = spread((b.q1 - 1) // tile - b.q0 // tile + 1)  # one entry per band and tile that it touches
    at = (b.q0 // tile)[band] + n
    row0, row1 = np.maximum(b.q0[band], at * tile), np.minimum(b.q1[band], (at + 1) * tile)
    start = np.maximum(b.k0[band], row0 + lo[band])
    first = start // block
    last = np.minimum(b.k1[band] - 1, row1 - 1 + hi[band]) // block
    order = np.lexsort((start, hi[band], lo[band], at))
    band, at, row0, row1, first, last = (x[order] for x in (band, at, row0, row1, first, last))

    num_tiles = -(-num_rows // tile)
    begin = np.searchsorted(at, np.arange(num_tiles + 1))
    total = np.append(0, np.cumsum(last - first + 1))
    before = total[begin[at]]  # blocks of all earlier tiles
    entries = np.stack(
        [
            first - (total[:-1] - before),
            total[1:] - before,
            row0,
            row1,
            b.k0[band],
            b.k1[band],
            lo[band],
            hi[band],
        ],
        axis=1,
    )
    blocks = np.diff(total[begin])
    reads = np.append(first, 0)[begin[:-1]]  # where a tile's keys begin: who shares keys
    return WorkList(_items(num_groups, tile, blocks, begin[:-1], reads), _int32(entries))


def _items(num_groups: int, tile: int, blocks: np.ndarray, first_entry: np.ndarray, reads: np.ndarray) -> np.ndarray:
    """(tiles x groups, 4): large before small; then by the keys they read: their first block, the head."""
    size = np.ceil(BUCKETS_PER_OCTAVE * np.log2(np.maximum(blocks, 0.5))).astype(np.int64)
    smaller = size.max(initial=0) - size
    at, group = np.divmod(np.arange(len(blocks) * num_groups), max(num_groups, 1))
    order = order_by(smaller[at], reads[at], group, len(blocks) - 1 - at)
    at, group = at[order], group[order]
    return _int32(np.stack([at * tile, group, first_entry[at], blocks[at]], axis=1))


def _int32(x: np.ndarray) -> np.ndarray:
    assert np.abs(x).max(initial=0) < 2**31, "more blocks on one server than an int32 counts"
    return np.ascontiguousarray(x, np.int32)
