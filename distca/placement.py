"""Which rank holds which rows?

Every rank holds the same number of tokens. Documents are laid out in their order, so a document that crosses a border
between ranks is split there: its head ends one rank, its tail begins the next, and a long document may span many ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Segments:
    """Rank `rank` holds rows [start, end) of `document` as its own rows [row, row + end - start). Sorted by rank, then
    row."""

    document: np.ndarray  # (N,) int64
    start: np.ndarray  # (N,) int64
    end: np.ndarray  # (N,) int64
    rank: np.ndarray  # (N,) int64
    row: np.ndarray  # (N,) int64

    def of_rank(self, rank: int) -> Segments:
        mine = self.rank == rank
        return Segments(self.document[mine], self.start[mine], self.end[mine], self.rank[mine], self.row[mine])


def place(lengths: np.ndarray, num_ranks: int) -> Segments:
    """Documents of `lengths` tokens, in order, onto ranks of equal size; the sum must be a multiple of `num_ranks`."""
    ends = np.cumsum(lengths, dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    assert total % num_ranks == 0, f"{total} tokens cannot be shared equally by {num_ranks} ranks"
    tokens = max(total // num_ranks, 1)
    borders = np.unique(np.concatenate([[0], ends, np.arange(0, total, tokens)]))
    start, end = borders[:-1], borders[1:]
    document = np.searchsorted(ends, start, side="right")  # skips documents without tokens
    first = ends[document] - np.asarray(lengths, np.int64)[document]
    return Segments(document, start - first, end - first, start // tokens, start % tokens)
