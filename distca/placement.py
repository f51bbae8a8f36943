"""Which rank holds which rows?

Every rank holds the same number of rows. Which documents lie where is free: their order inside one optimizer step does not
change the gradient. So documents are placed where their attention is cheap to share out:

    rank 0   | A rows 0..      | c  | x x x x|     A, B   long documents, more work than one server's share: cut into *stripes*,
    rank 1   | A rows 8K..     | x x x x x x |            fewer than servers will work on them (`num_stripes`), longest first,
    rank 2   | A rows 16K..    | B rows 0..  |            each stripe on the rank with least work so far
    rank 3   | B rows 12K..    | d  | x x x x|     c to h whole documents: fill one rank after another with a share of work,
    rank 4   | e   | f   | g   | h   | x x x |            so that some ranks are served without any traffic and others,
    rank 5   | x x x x x x x x x x x x x x x |     x      with short documents only, have their servers' time to give away

Only the last rows are cut where they happen to cross a border between ranks, and those belong to the shortest documents.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from dataclasses import dataclass
from math import isqrt

import numpy as np


@dataclass(frozen=True, slots=True)
class Segments:
    """Rank `rank` holds rows [start, end) of `document` as its own rows [row, row + end - start). Sorted by rank, then row."""

    document: np.ndarray  # (N,) int64
    start: np.ndarray  # (N,) int64
    end: np.ndarray  # (N,) int64
    rank: np.ndarray  # (N,) int64
    row: np.ndarray  # (N,) int64

    def of_rank(self, rank: int) -> Segments:
        mine = self.rank == rank
        return Segments(self.document[mine], self.start[mine], self.end[mine], self.rank[mine], self.row[mine])


def place(lengths: np.ndarray, work: np.ndarray, share: np.ndarray, block: int, group: int = 4) -> Segments:
    """Documents of `lengths` tokens and `work` pairs onto ranks whose servers should each do `share` pairs."""
    num_ranks, total = len(share), int(lengths.sum())
    assert total % num_ranks == 0, f"{total} tokens cannot be shared equally by {num_ranks} ranks"
    tokens = total // num_ranks
    free, room = [tokens] * num_ranks, share.tolist()  # rows and pairs that each rank can still take
    order = np.lexsort((np.arange(len(lengths)), -lengths, -work))
    order = order[lengths[order] > 0]
    mean = max(1, sum(room) // num_ranks)
    is_long = (work[order] > mean) | (lengths[order] > tokens)
    huge = is_long & (work[order] // mean * 2 > THETA * group)
    stripes = _place_stripes(order[huge], lengths, work, mean, free, room, block)
    short = order[~is_long]
    n, w = lengths[short], work[short]
    density = _filler_density(n, w, lengths[order[is_long & ~huge]], work[order[is_long & ~huge]], free, room)
    rocks = work[short] * ROCK > mean
    if ROCK:
        stripes += _place_rocks(short[rocks], lengths, work, density, free, room)
        short = short[~rocks]
    stripes += _place_pairs(order[is_long & ~huge], lengths, work, mean, free, room, block, density)
    stripes += _place_whole(short, lengths, work, free, room)
    table = np.array(stripes, np.int64).reshape(-1, 4) if not isinstance(stripes, np.ndarray) else stripes
    table = table[np.lexsort((table[:, 1], table[:, 0], table[:, 3]))]
    document, start, end, rank = table.T
    before = np.cumsum(end - start) - (end - start)
    return Segments(document, start, end, rank, before - rank * tokens)


THETA = 3
ROCK = 32


def _place_rocks(documents, lengths, work, density, free, room):
    """Best fit."""
    out = []
    ranks = sorted((int(room[r] - density * free[r]), r) for r in range(len(free)))
    from bisect import bisect_left, insort
    for d in documents.tolist():
        need = int(work[d] - density * lengths[d])
        at = bisect_left(ranks, (need,))
        while at < len(ranks) and free[ranks[at][1]] < lengths[d]:
            at += 1
        if at == len(ranks):
            at -= 1
            while at >= 0 and free[ranks[at][1]] < lengths[d]:
                at -= 1
        if at < 0:
            r = max(range(len(free)), key=lambda r: free[r])
            left = int(lengths[d]); a = 0
            while left:
                r = max(range(len(free)), key=lambda r: free[r])
                t = min(free[r], left)
                out.append((d, a, a + t, r)); a += t; left -= t; free[r] -= t; room[r] -= int(work[d]) * t // int(lengths[d])
            ranks = sorted((int(room[r] - density * free[r]), r) for r in range(len(free)))
            continue
        _, r = ranks.pop(at)
        out.append((d, 0, int(lengths[d]), r))
        free[r] -= int(lengths[d]); room[r] -= int(work[d])
        insort(ranks, (int(room[r] - density * free[r]), r))
    return out



def _place_pairs(documents, lengths, work, mean, free, room, block, density):
    out = []
    ranks = sorted(range(len(free)), key=lambda r: (-room[r], r))
    at = 0
    for d in documents.tolist():
        length = int(lengths[d])
        per_row = int(work[d]) / length
        head, tail = 0, length
        while head < tail:
            while at < len(ranks):
                r = ranks[at]
                rows = (room[r] - density * free[r]) / max(per_row - density, 1e-9)
                rows = min(rows, free[r])
                if rows * per_row >= mean * SMALLEST or rows >= tail - head:
                    break
                at += 1
            if at == len(ranks):
                want = max(2 * block, round(mean / LATE / per_row))
                r = max(range(len(free)), key=lambda r: (min(free[r], want), room[r] - density * free[r], -r))
                rows = min(free[r], want)
            half = max(1, round(rows / 2 / block)) * block
            if 2 * half > free[r]:
                half = free[r] // 2 // block * block or (free[r]+1) // 2
            if 2 * half >= tail - head - block and free[r] >= tail - head:
                parts = [(head, tail)]
            else:
                low = (tail - half) // block * block
                if tail - low + half > free[r]: low = tail - (free[r] - half)
                low = max(low, head + half)
                parts = [(head, head + half), (low, tail)]
                head, tail = head + half, low
                parts = [x for x in parts if x[1] > x[0]]
            if len(parts) == 1 and parts[0] == (head, tail):
                head = tail
            for a, b in parts:
                out.append((d, a, b, r))
                free[r] -= b - a
                room[r] -= int(work[d]) * (b * b - a * a) // (length * length)
    return out


SMALLEST = 0.05
LATE = 4


def num_stripes(work: int, share: int) -> int:
    return max(1, (isqrt(isqrt(isqrt(256 * work**7 // share**7))) + 1) // 2)


def _place_stripes(documents, lengths, work, mean, free, room, block):
    out = []
    heap = [(-room[r], r) for r in range(len(free))]
    heapq.heapify(heap)
    for d in documents.tolist():
        length = int(lengths[d])
        p = num_stripes(int(work[d]), mean)
        rows = min(-(-length // (p * block)) * block, max(block, max(free) ))
        start = 0
        skipped = []
        while start < length:
            want = min(rows, length - start)
            while heap:
                key, r = heapq.heappop(heap)
                if free[r] >= want:
                    break
                skipped.append((key, r))
            else:
                r = max(range(len(free)), key=lambda r: (free[r], -r))
                want = min(want, free[r])
                key = None
            end = start + want
            pairs = int(work[d]) * (end * end - start * start) // (length * length)
            out.append((d, start, end, r))
            free[r] -= want
            room[r] -= int(pairs)
            start = end
            if key is None:
                skipped = [(-room[r] if q == r else k, q) for k, q in skipped]
            else:
                heapq.heappush(heap, (-room[r], r))
        for x in skipped:
            heapq.heappush(heap, x)
    return out


def _place_whole(documents, lengths, work, free, room):
    out = []
    n = lengths[documents]
    w = work[documents]
    rows_up_to, work_up_to = [0] + np.cumsum(n).tolist(), [0] + np.cumsum(w).tolist()
    # density of the sparsest half of the tokens
    density = _filler_density(n, w, n[:0], w[:0], free, room)
    at = 0
    ranks = sorted(range(len(free)), key=lambda r: (room[r], r))
    for r in ranks:
        # work cap with reserve: work + (free - rows) * density <= room
        if at >= len(n):
            break
        lo = at
        hi = bisect_right(rows_up_to, rows_up_to[at] + free[r]) - 1
        base = room[r] - density * free[r]
        if base <= 0: continue
        # largest b with work[b]-work[at] - density*(rows[b]-rows[at]) <= base ; monotone while docs are denser
        a, b = at, hi
        while a < b:
            m = (a + b + 1) // 2
            if work_up_to[m] - work_up_to[at] - density * (rows_up_to[m] - rows_up_to[at]) <= base:
                a = m
            else:
                b = m - 1
        if a > at:
            out.append((at, a, r))
            free[r] -= rows_up_to[a] - rows_up_to[at]
            room[r] -= work_up_to[a] - work_up_to[at]
            at = a
    for _ in range(2):
        for r in sorted(range(len(free)), key=lambda r: (-max(0,room[r])/max(1,free[r]), -free[r], r)):
            if at >= len(n): break
            a = bisect_right(rows_up_to, rows_up_to[at] + free[r]) - 1
            if a > at:
                out.append((at, a, r))
                free[r] -= rows_up_to[a] - rows_up_to[at]
                room[r] -= work_up_to[a] - work_up_to[at]
                at = a
    result = []
    for a, b, r in out:
        result += [(d, 0, l, r) for d, l in zip(documents[a:b].tolist(), n[a:b].tolist())]
    # pour the rest
    r = 0
    for d, l in zip(documents[at:].tolist(), n[at:].tolist()):
        s = 0
        while s < l:
            while free[r] == 0: r += 1
            t = min(l - s, free[r])
            result.append((d, s, s + t, r)); free[r] -= t; s += t
    return result


def _filler_density(n, w, long_n, long_w, free, room):
    """Pairs per row of the sparsest documents, those that fill up ranks whose servers are busy already."""
    n, w = n[::-1], w[::-1]  # sparsest first
    rows, pairs = np.cumsum(n), np.cumsum(w)
    if len(n) == 0: return 0.0
    F, T = sum(room) / len(room), (sum(free)) / len(room)
    tokens, work = int(long_n.sum()), int(long_w.sum())
    # whole documents of at least half the mean density also fill servers up
    return _fix(n, w, rows, pairs, tokens, work, free, room)


def _fix(n, w, rows, pairs, tokens, work, free, room):
    busy_rows = sum(f for f, x in zip(free, room) if x <= 0)
    open_rooms = [x for x in room if x > 0]
    R = len(open_rooms)
    if R == 0: return 0.0
    F = sum(open_rooms) / R
    T = sum(f for f, x in zip(free, room) if x > 0) / R
    rho = 0.0
    # the documents sorted densest first, joined to the long ones, until what is left is only filler
    dense_rows, dense_pairs = tokens + np.cumsum(n[::-1]), work + np.cumsum(w[::-1])
    for _ in range(4):
        # ranks that the densest documents keep busy, each T rows with filler of density rho
        ranks = (dense_pairs - rho * dense_rows) / max(F - rho * T, 1e-9)
        filler = busy_rows + ranks * T - dense_rows
        # how many dense documents: those denser than F/T
        k = int(np.searchsorted(-(w[::-1] / n[::-1]), -F / T))
        need = busy_rows + ((work if k == 0 else dense_pairs[k-1]) - rho * (tokens if k == 0 else dense_rows[k-1])) / max(F - rho * T, 1e-9) * T - (tokens if k == 0 else dense_rows[k-1])
        m = int(np.searchsorted(rows, need))
        m = min(m, len(rows) - 1)
        rho = pairs[m] / rows[m]
        rho = min(rho, F / T)
    return rho
