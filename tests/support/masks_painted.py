"""Which pairs does a list of bands allow? By brute force: the truth for everything said about masks."""

import numpy as np

from distca.masks import Bands


def count(bands: Bands, rows: int, keys: int) -> np.ndarray:
    """(rows, keys) int64: how many of the bands allow each (query, key) pair."""
    painted = np.zeros((rows, keys), np.int64)
    for q0, q1, k0, k1, lo, hi in bands.rows():
        for q in range(q0, q1):
            first, last = k0 + max(q - q0 + lo, 0), min(k0 + q - q0 + hi, k1 - 1)
            painted[q, first : max(last + 1, first)] += 1
    return painted


def paint(bands: Bands, rows: int, keys: int) -> np.ndarray:
    """(rows, keys) bool: which pairs some band allows."""
    return count(bands, rows, keys) > 0
