"""Where do other methods of context parallelism keep a micro-batch's rows? The layouts that ours is compared with.

    whole_documents   rank 0  AAAAAA        longest first, each where fewest rows lie; ranks may hold unequal amounts
                      rank 1  BBB CC d
    in_order          rank 0  AAAAAA        end to end, cut where a rank is full
                      rank 1  BBB CC d
    zigzag            rank 0  A0 A3  d      each document in two chunks per rank, rank r has the r-th and the r-th from
                      rank 1  A1 A2  CC     the end: equal rows see about equally many keys; short documents stay whole

A decision from integers alone. Every row of every document is in exactly one segment.
"""

from __future__ import annotations

import heapq

import numpy as np

from distca.masks import Bands, MaskRule, bands_of, cut
from distca.placement import Segments


def whole_documents(lengths: np.ndarray, ranks: int) -> Segments:
    """Longest first, each document onto the rank with fewest rows; ties go to the lower rank."""
    lengths = np.asarray(lengths, np.int64)
    document = np.argsort(-lengths, kind="stable")
    return _side_by_side(document, 0 * document, lengths[document], _where_fewest_rows(lengths[document], [0] * ranks))


def in_order(lengths: np.ndarray, ranks: int) -> Segments:
    """Documents end to end over ranks of equally many rows; the sum of `lengths` must be a multiple of `ranks`."""
    end = np.cumsum(np.asarray(lengths, np.int64))
    rows = int(end[-1]) // ranks
    assert rows * ranks == end[-1], f"{end[-1]} rows on {ranks} ranks"
    cuts = np.union1d(np.append(0, end), np.arange(ranks) * rows)  # wherever a document or a rank begins
    first, last = cuts[:-1], cuts[1:]
    document = np.searchsorted(end, first, side="right")
    begin = end[document] - np.asarray(lengths, np.int64)[document]
    return Segments(document, first - begin, last - begin, first // rows, first % rows)


def zigzag(lengths: np.ndarray, ranks: int, shortest: int) -> Segments:
    """Documents of at least `shortest` rows in 2 * `ranks` chunks,
    each rank's first; shorter ones whole, as in `whole_documents`."""
    lengths = np.asarray(lengths, np.int64)
    is_cut = (lengths >= shortest) & (lengths >= 2 * ranks)
    long, short = np.flatnonzero(is_cut), np.flatnonzero(~is_cut)
    short = short[np.argsort(-lengths[short], kind="stable")]
    chunk = np.arange(2 * ranks)
    bounds = np.arange(2 * ranks + 1) * lengths[long][:, None] // (2 * ranks)  # (long documents, chunks + 1)
    bounds[:, ranks] = bounds[:, ranks - 1]  # the last rank's two chunks are neighbours: one segment
    some = np.broadcast_to(bounds[:, :-1] < bounds[:, 1:], (len(long), 2 * ranks))
    document = np.repeat(long, 2 * ranks).reshape(some.shape)[some]
    start, end = bounds[:, :-1][some], bounds[:, 1:][some]
    rank = np.broadcast_to(np.minimum(chunk, 2 * ranks - 1 - chunk), some.shape)[some]
    held = np.bincount(rank, end - start, ranks).astype(np.int64).tolist()
    return _side_by_side(
        np.append(document, short),
        np.append(start, 0 * short),
        np.append(end, lengths[short]),
        np.append(rank, _where_fewest_rows(lengths[short], held)),
    )


def tasks_of(rule: MaskRule, lengths: np.ndarray, segments: Segments, first_key: np.ndarray) -> Bands:
    """What the rows of one rank's segments attend, in that rank's own rows, where the keys of a segment's document
    begin at `first_key`, (segments,)."""
    lengths = np.asarray(lengths, np.int64)[segments.document]
    b = cut(bands_of(rule, lengths), segments.start, segments.end, 0, lengths)
    down = segments.row - segments.start
    return Bands(b.q0 + down, b.q1 + down, b.k0 + first_key, b.k1 + first_key, b.lo, b.hi)


def _where_fewest_rows(lengths: np.ndarray, held: list[int]) -> np.ndarray:
    """(documents,) the rank of each, which goes where fewest rows lie; `held` rows lie on each rank already."""
    ranks = [(rows, rank) for rank, rows in enumerate(held)]
    heapq.heapify(ranks)
    chosen = np.empty(len(lengths), np.int64)
    for n, length in enumerate(lengths.tolist()):
        rows, chosen[n] = ranks[0]
        heapq.heapreplace(ranks, (rows + length, int(chosen[n])))
    return chosen


def _side_by_side(document: np.ndarray, start: np.ndarray, end: np.ndarray, rank: np.ndarray) -> Segments:
    """Segments in their order on every rank, without gaps."""
    order = np.argsort(rank, kind="stable")
    document, start, end, rank = (x[order] for x in (document, start, end, rank))
    size = end - start
    before = np.cumsum(size) - size
    first = np.searchsorted(rank, rank)  # of each one's rank
    return Segments(document, start, end, rank, before - before[first])
