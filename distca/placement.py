"""Which rank holds which rows?

Every rank holds the same number of rows, up to one. Which documents lie where is free: their order inside one
optimizer step does not change the gradient. So documents are placed where their attention is cheap to share out,
longest first:

    rank 0   | A rows 0..    |  x  x  x  x |   A     *stripes*: a document of many servers' work is cut into fewer
    rank 1   | A rows 16K..  |  x  x  x  x |         stripes than servers will work on it, each on the rank with
                                                     least work so far
    rank 2   | B head | B tail | x x x x x |   B, C  *pairs*: a document of a few servers' work is laid along ranks from
    rank 3   | B   B | C head  |  C tail | |         its two ends inwards. A pair of h head and h tail rows sees about h
    rank 4   | C | d | e |  x  x  x  x  x  |         x length pairs wherever it is cut: each rank gets
                                                     what it has room for
    rank 5   | f   | g   | h   | i   | j   |   d..j  *whole* documents, each where it leaves least room
    rank 6   | x x x x x x x x x x x x x x |   x     *filler*: the shortest documents take the rows that are left, in
                                                     rounds: long ones where most work per free row is missing

Ranks 2 to 5 then need no help and give none: only keys travel for B and C, nothing for d to j. Ranks like 6 are the
ones with time to give to A. This is cheaper than making all ranks a little short of work, because what a server pays
for a tile grows with the square root of its work. Every rank will be filled up to its rows, so what it has room for
counts on top of filler (`_filler_density`). Where filler crosses a border between ranks it is cut, and that is one of
the shortest documents.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, bisect_right, insort
from dataclasses import dataclass

import numpy as np

from distca.arrays import order_by, spread

UNIT = 1024  # densities are integers: pairs per row, in 1/1024
LARGE = 32  # documents of more than 1/32 of a share are placed one by one


@dataclass(frozen=True, slots=True)
class Segments:
    """Rank `rank` holds rows [start, end) of `document` as its own rows [row, row + end - start).
    Sorted by rank, then row."""

    document: np.ndarray  # (N,) int64
    start: np.ndarray  # (N,) int64
    end: np.ndarray  # (N,) int64
    rank: np.ndarray  # (N,) int64
    row: np.ndarray  # (N,) int64

    def of_rank(self, rank: int) -> Segments:
        mine = self.rank == rank
        return Segments(self.document[mine], self.start[mine], self.end[mine], self.rank[mine], self.row[mine])


def packed_in_order(lengths: np.ndarray, num_ranks: int) -> Segments:
    """Documents end to end in their own order on ranks of equal rows, up to one: how they lie if nobody places them."""
    documents, total = np.flatnonzero(lengths), int(lengths.sum())
    first_row = np.cumsum(lengths[documents]) - lengths[documents]
    borders = np.arange(num_ranks) * total // num_ranks
    at = np.union1d(first_row, borders)
    at = at[at < total]
    index, rank = (np.searchsorted(starts, at, side="right") - 1 for starts in (first_row, borders))
    start = at - first_row[index]
    return Segments(documents[index], start, start + np.diff(at, append=total), rank, at - borders[rank])


def place(
    lengths: np.ndarray, work: np.ndarray, share: np.ndarray, rows: np.ndarray, group: int, block: int
) -> Segments:
    """Documents of `lengths` tokens, longest first, and `work` pairs onto ranks of exactly `rows` each, good for
    `share` pairs.

    `group` is what a moved query row costs in moved key rows."""
    num_ranks = len(share)
    assert lengths.sum() == rows.sum(), f"{lengths.sum()} tokens for {num_ranks} ranks with {rows.sum()} rows"
    lengths, work = lengths[lengths > 0], work[lengths > 0]
    ranks = _Ranks(rows.tolist(), share.tolist())
    mean = max(1, int(share.sum()) // num_ranks)

    num_split = int(np.count_nonzero((work > mean) | (lengths > rows.max())))
    # pairs move only keys, but to all ranks of the document: that pays up to 3/2 * group shares of work, and up to
    # twice as many where stripes would be longer than a rank's rows
    of_split = zip(lengths[:num_split].tolist(), work[:num_split].tolist(), strict=True)
    crowded = np.array([length > num_stripes(pairs, mean) * int(rows.max()) for length, pairs in of_split], bool)
    by_stripes = 2 * work[:num_split] > 3 * group * mean * (1 + crowded)
    striped, paired = np.flatnonzero(by_stripes), np.flatnonzero(~by_stripes)
    whole = np.arange(num_split, len(lengths))
    table = _lay_stripes(striped, lengths, work, mean, ranks, block)
    filler = _Queue(lengths[num_split:], work[num_split:])
    table += _lay_pairs(paired, lengths, work, mean, ranks, filler, block)
    table += _lay_whole(whole, lengths, work, mean, ranks, filler)
    split = np.array(table, np.int64).reshape(-1, 4)
    is_queued = np.ones(len(lengths), bool)
    is_queued[split[:, 0]] = False
    whole = np.flatnonzero(is_queued)
    queued, start, end, rank = _fill(_Queue(lengths[whole], work[whole]), ranks, mean)

    document = np.concatenate([split[:, 0], whole[queued]])
    start, end = np.concatenate([split[:, 1], start]), np.concatenate([split[:, 2], end])
    rank = np.concatenate([split[:, 3], rank])
    order = order_by(rank, document, start)
    document, start, end, rank = document[order], start[order], end[order], rank[order]
    return Segments(document, start, end, rank, np.cumsum(end - start) - (end - start) - (np.cumsum(rows) - rows)[rank])


def place_in_neighbourhoods(
    lengths: np.ndarray, work: np.ndarray, share: np.ndarray, rows: np.ndarray, group: int, block: int, number: int
) -> Segments:
    """`place` onto so many neighbourhoods, each taken for one large rank; then each one's documents and parts of
    documents onto its own ranks."""
    if number == 1:
        return place(lengths, work, share, rows, group, block)
    number = min(number, len(share))
    first = np.arange(number + 1) * len(share) // number
    pooled = (np.add.reduceat(column, first[:-1]) for column in (share, rows))
    outer, parts = place(lengths, work, *pooled, group, block), []
    for neighbourhood, (low, high) in enumerate(zip(first[:-1].tolist(), first[1:].tolist(), strict=True)):
        mine = outer.of_rank(neighbourhood)
        part_rows, part_work = mine.end - mine.start, work[mine.document]
        for i in np.flatnonzero(part_rows < lengths[mine.document]).tolist():
            d, start, end = (int(column[i]) for column in (mine.document, mine.start, mine.end))
            part_work[i] = _pairs_of_rows(int(work[d]), int(lengths[d]), start, end)
        order = np.argsort(-part_rows, kind="stable")
        inner = place(part_rows[order], part_work[order], share[low:high], rows[low:high], group, block)
        at = order[inner.document]
        start = mine.start[at]
        parts.append((mine.document[at], start + inner.start, start + inner.end, inner.rank + low, inner.row))
    return Segments(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def split_ranks(homes: Segments, num_ranks: int, rows: int) -> Segments:
    """Segments of homes, each a group of `num_ranks` ranks of `rows` rows -> segments of ranks, in the same order."""
    last_row = homes.row + homes.end - homes.start - 1
    index, nth = spread(last_row // rows - homes.row // rows + 1)
    rank_in_home = homes.row[index] // rows + nth
    skipped = np.maximum(rank_in_home * rows - homes.row[index], 0)  # rows of the segment on earlier ranks
    start = homes.start[index] + skipped
    row = homes.row[index] + skipped - rank_in_home * rows
    end = np.minimum(homes.end[index], start + rows - row)
    return Segments(homes.document[index], start, end, homes.rank[index] * num_ranks + rank_in_home, row)


def equal_rows(total: int, num_ranks: int) -> np.ndarray:
    """(ranks,) int64: `total` rows shared out as evenly as possible."""
    return np.diff(np.arange(num_ranks + 1) * total // num_ranks)


def num_stripes(work: int, share: int) -> int:
    """m / (1 + m / 64), rounded, for m = work / share: fewer stripes save bytes, more of them spread what each of their
    ranks sends."""
    parts = 64 * share + work
    return max(1, (2 * 64 * work + parts) // (2 * parts))


class _Ranks:
    """What every rank can still take while documents are laid out: `free` rows and `room` pairs."""

    def __init__(self, free: list[int], room: list[int]):
        self.free, self.room = free, room
        self._heap = [(-pairs, rank) for rank, pairs in enumerate(room)]
        heapq.heapify(self._heap)

    def take(self, rank: int, rows: int, pairs: int) -> None:
        self.free[rank] -= rows
        self.room[rank] -= pairs
        heapq.heappush(self._heap, (-self.room[rank], rank))

    def roomiest(self, rows: int) -> int | None:
        """The rank with room for most pairs among those with `rows` free rows."""
        found, too_full = None, []
        while self._heap and found is None:
            entry = heapq.heappop(self._heap)
            pairs, rank = entry
            if -pairs != self.room[rank] or self.free[rank] == 0:
                continue  # out of date: a newer entry of this rank is in the heap
            too_full.append(entry)
            if self.free[rank] >= rows:
                found = rank
        for entry in too_full:
            heapq.heappush(self._heap, entry)
        return found


class _Queue:
    """Whole documents, longest first, with running sums: entries [a, b) hold rows[b] - rows[a] rows."""

    def __init__(self, lengths: np.ndarray, work: np.ndarray):
        self.lengths, self.work = lengths, work
        self.per_row = work // lengths
        self.rows, self.pairs = (np.append(0, np.cumsum(column)) for column in (lengths, work))

    def __len__(self) -> int:
        return len(self.lengths)


def _lay_stripes(documents, lengths, work, mean, ranks, block) -> list[tuple[int, int, int, int]]:
    """(document, start, end, rank) of even stripes, each on the rank with most room."""
    table, largest = [], max(ranks.free)
    for d in documents.tolist():
        length, pairs, start = int(lengths[d]), int(work[d]), 0
        rows = _up(-(-length // num_stripes(pairs, mean)), block)
        rows = min(rows, max(block, largest * 7 // 8 // block * block))  # longer ones would fit on few ranks
        while start < length:
            rank = ranks.roomiest(min(rows, length - start))
            if rank is None:
                rows = max(1, rows // 2 // block * block or rows // 2)
                continue
            end = min(start + rows, length)
            table.append((d, start, end, rank))
            ranks.take(rank, end - start, _pairs_of_rows(pairs, length, start, end))
            start = end
    return table


def _lay_pairs(documents, lengths, work, mean, ranks, filler, block) -> list[tuple[int, int, int, int]]:
    """(document, start, end, rank) of head and tail pairs, from both ends inwards,
    as large as each rank has room for."""
    if not len(documents):
        return []
    table = []
    density = _filler_density(filler, int(lengths[documents].sum()), int(work[documents].sum()), ranks, mean)
    waiting = sorted(range(len(ranks.room)), key=lambda r: (ranks.room[r], -r))  # popped from its end: most room first
    for d in documents.tolist():
        length, pairs, head, tail = int(lengths[d]), int(work[d]), 0, int(lengths[d])
        per_row = UNIT * pairs // length
        while head < tail:
            rows = 0
            while waiting and not rows:
                rank = waiting[-1]  # its free rows will be filled up, so a pair's rows replace filler
                room = UNIT * ranks.room[rank] - density * ranks.free[rank]
                rows = min(max(room, 0) // max(per_row - density, 1), ranks.free[rank], tail - head)
                if rows * per_row < UNIT * mean // 20 and rows < tail - head:  # not worth a twentieth of a share
                    waiting.pop()
                    rows = 0
            if not rows:  # every rank has its share: spread what is left, in quarters of a share
                rows = min(max(2 * block, UNIT * mean // 4 // max(per_row, 1)), tail - head)
                while (rank := ranks.roomiest(rows)) is None:
                    rows = max(1, rows // 2)
            half = max(block, _nearest(rows // 2, block))
            if tail - head - 2 * half >= block and 2 * half <= ranks.free[rank]:
                parts = [(head, head + half), (_up(tail - half, block), tail)]
                head, tail = parts[0][1], parts[1][0]
            else:  # the last rows of the document, or of the rank
                rows = tail - head if tail - head <= ranks.free[rank] else max(rows // block * block, min(rows, block))
                parts = [(head, head + rows)]
                head += rows
            for start, end in parts:
                table.append((d, start, end, rank))
                ranks.take(rank, end - start, _pairs_of_rows(pairs, length, start, end))
    return table


def _lay_whole(documents, lengths, work, mean, ranks, filler) -> list[tuple[int, int, int, int]]:
    """(document, 0, length, rank) of documents of more than 1/32 of a share: each where it leaves least room.

    One for which nobody has room goes where most is."""
    table = []
    density = _filler_density(filler, 0, 0, ranks, mean)
    documents = documents[work[documents] > mean // LARGE]
    excess = work[documents] - density * lengths[documents] // UNIT  # a document's rows replace filler
    large = np.flatnonzero(excess > mean // LARGE)
    # (free rows, room, rank) of ranks with too few rows, (room, rank) of the others: documents become shorter
    waiting = sorted((free, ranks.room[r] - density * free // UNIT, r) for r, free in enumerate(ranks.free))
    able = []
    for d, pairs in zip(documents[large].tolist(), excess[large].tolist(), strict=True):
        rows = int(lengths[d])
        while waiting and waiting[-1][0] >= rows:
            insort(able, waiting.pop()[1:])
        if able:
            room, rank = able.pop(min(bisect_left(able, (pairs,)), len(able) - 1))
            table.append((d, 0, rows, rank))
            ranks.take(rank, rows, int(work[d]))
            insort(waiting, (ranks.free[rank], room - pairs, rank))
    return table


def _fill(queue: _Queue, ranks: _Ranks, mean: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Entries of the queue, first row, last row, rank: whole documents in runs, then what is left, cut where it must
    be. Longest documents go where most work is needed for each row that is free."""
    ends, takers, at, free, room = [0], [], 0, ranks.free, ranks.room
    rows, pairs = memoryview(queue.rows), memoryview(queue.pairs)  # whose entries are Python's integers

    def take_run(rank: int, end: int) -> int:
        if end <= at:
            return at
        ends.append(end)
        takers.append(rank)
        free[rank] -= rows[end] - rows[at]
        room[rank] -= pairs[end] - pairs[at]
        return end

    def neediest() -> list[int]:
        left = np.array(free)
        missing = np.maximum(UNIT * np.array(room), 0) // np.maximum(left, 1)
        order = np.lexsort((-left, -missing))
        return order[left[order] > 0].tolist()

    density = _filler_density(queue, 0, 0, ranks, mean)
    excess = lambda end: UNIT * pairs[end] - density * rows[end]  # noqa: E731
    for rank in neediest():  # one rank after another up to its share of work, filler included
        fits = bisect_right(rows, rows[at] + free[rank], at) - 1
        spare = UNIT * room[rank] - density * free[rank]
        at = take_run(rank, bisect_right(range(fits + 1), spare + excess(at), at + 1, key=excess) - 1)
    for part in (2, 2, 2, 1, 1):  # up to its rows, half of what is left at a time: a later round evens out the earlier
        for rank in neediest():
            at = take_run(rank, bisect_right(rows, rows[at] + free[rank] // part, at) - 1)

    rank = np.repeat(np.array(takers, np.int64), np.diff(ends))
    whole = np.arange(at), np.zeros(at, np.int64), queue.lengths[:at], rank
    entry, *cut = _pour(queue.rows[at:] - queue.rows[at], np.cumsum([0, *free]))
    return tuple(np.concatenate(both) for both in zip(whole, (at + entry, *cut), strict=True))


def _pour(entries: np.ndarray, vessels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Lay entries end to end beside vessels (borders of both, from 0 to one total):
    entry, its first and last row, vessel."""
    assert entries[-1] == vessels[-1], f"{entries[-1]} rows for {vessels[-1]} places"
    borders = np.unique(np.concatenate([entries, vessels]))
    start, end = borders[:-1], borders[1:]
    entry = np.searchsorted(entries, start, side="right") - 1
    return entry, start - entries[entry], end - entries[entry], np.searchsorted(vessels, start, side="right") - 1


def _filler_density(filler: _Queue, rows: int, pairs: int, ranks: _Ranks, mean: int) -> int:
    """Pairs per row of the shortest documents, those that will fill up the ranks which have their share of work
    without them.

    Beside `filler`, documents of `rows` and `pairs` are still to be placed. Each full rank gives `density` back per
    row that is not filler; a few rounds settle which ranks need more than filler, and which documents they get."""
    if not len(filler):
        return 0
    free, room = np.array(ranks.free), np.array(ranks.room)
    heavy = np.flatnonzero(filler.work > mean // 6)
    density = 0
    for _ in range(4):
        opened = UNIT * room - density * free > UNIT * mean // 20
        open_rows, open_room = int(free[opened].sum()), int(room[opened].sum())
        if not open_rows:
            break
        # documents with more work per row than these ranks need, or too much for filler, fill ranks up
        excess = filler.work[heavy] - density * filler.lengths[heavy] // UNIT
        dense = filler.per_row >= -(-open_room // open_rows)
        dense[heavy] |= excess > mean // 6
        num_dense = np.count_nonzero(dense)
        full_rows, full_pairs = rows + int(filler.rows[num_dense]), pairs + int(filler.pairs[num_dense])
        spare = max(1, UNIT * open_room - density * open_rows)
        full_ranks = max(0, UNIT * full_pairs - density * full_rows) * open_rows // spare  # in rows
        all_rows, all_pairs = int(filler.rows[-1]), int(filler.pairs[-1])
        need = min(max(0, sum(ranks.free) - open_rows + full_ranks - full_rows), all_rows)
        first = min(int(np.searchsorted(filler.rows, all_rows - need)), len(filler) - 1)
        of_filler = UNIT * (all_pairs - int(filler.pairs[first])) // (all_rows - int(filler.rows[first]))
        before, density = density, min(of_filler, UNIT * open_room // open_rows)
        if density == before:
            break
    return density


def _pairs_of_rows(pairs: int, length: int, start: int, end: int) -> int:
    """About how many of a document's pairs its rows [start, end) attend: late rows see more."""
    return pairs * (end * end - start * start) // (length * length)


def _up(x: int, block: int) -> int:
    return -(-x // block) * block


def _nearest(x: int, block: int) -> int:
    return (x + block // 2) // block * block
