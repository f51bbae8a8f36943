"""Columns of integers: sums by key, order by several columns, ranges. Exact, and the same on every machine."""

from __future__ import annotations

import numpy as np


def sum_by(key: np.ndarray, value: np.ndarray, size: int) -> np.ndarray:
    """(size,) int64 sums of `value` by `key`, exact where float bincount would not be."""
    out = np.zeros(size, np.int64)
    np.add.at(out, key, value)
    return out


def order_by(*columns: np.ndarray) -> np.ndarray:
    """(N,) the stable order by the first column, then the second …; none holds a negative number."""
    count = len(columns[0])
    widths = [int(column.max(initial=0)).bit_length() for column in columns]
    number_width = count.bit_length()
    if sum(widths) + number_width > 63:  # too wide for one key: by all but the last column, which decides among equals
        if len(columns) == 1:
            return np.argsort(columns[0], kind="stable")
        order = order_by(*columns[:-1])
        fresh = np.logical_or.reduce([np.diff(column[order]) != 0 for column in columns[:-1]])
        group = np.append(0, np.cumsum(fresh))[:count]
        equal = np.flatnonzero(np.bincount(group)[group] > 1)  # few of the documents and rows of a plan
        order[equal] = order[equal[np.lexsort((columns[-1][order[equal]], group[equal]))]]
        return order
    key = columns[0]
    for column, width in zip(columns[1:], widths[1:], strict=True):
        key = key << width | column
    key = key << number_width | np.arange(count)  # one packed key: several times faster than lexsort
    key.sort()
    return key & ((1 << number_width) - 1)


def ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """[3, 10], [2, 3] -> [3, 4, 10, 11, 12]."""
    return np.repeat(starts - (np.cumsum(counts) - counts), counts) + np.arange(int(counts.sum()))


def spread(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[2, 0, 3] -> ([0, 0, 2, 2, 2], [0, 1, 0, 1, 2]): which entry each repeat belongs to, and its number within it."""
    if (counts == 1).all():  # often, and then there is nothing to compute
        return np.arange(len(counts)), np.zeros(len(counts), np.int64)
    index = np.repeat(np.arange(len(counts)), counts)
    starts = np.cumsum(counts) - counts
    return index, np.arange(len(index)) - starts[index]
