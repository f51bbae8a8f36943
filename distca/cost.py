"""How long does a CA-task take, and how many FLOPs and bytes is it?

The planner makes the predicted *cost* of all servers equal. A cost is a whole number in a unit of its own, a function
of a task's rows and pairs (a kernel's time depends on them, hardly on where the pairs lie):

    PairCost      one for each (query, key) pair
    RowBlockCost  a kernel works on blocks of 128 rows: an incomplete block costs a whole one, and each block costs
                  `overhead` keys more than it has. Fits 359 measured points of FlashAttention 2 with 3.7 % median error
    TableCost     picoseconds, measured on (rows x keys) tiles of one kind of device

They are replaceable values: the planner knows only `of`. Integers alone, so that plans are the same on every machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from distca.masks import Bands

PICOSECONDS = 10**12


class Cost(Protocol):
    """What planning needs to know about a kernel."""

    def of(self, bands: Bands) -> np.ndarray:
        """(B,) int64: the cost of each band as a task of its own; 0 for a band without pairs."""

    def to_words(self) -> list[int]:
        """As integers, the first of them the kind: what `cost_from_words` takes."""


@dataclass(frozen=True, slots=True)
class PairCost:
    """One for each (query, key) pair."""

    def of(self, bands: Bands) -> np.ndarray:
        return bands.area()

    def to_words(self) -> list[int]:
        return [0]


@dataclass(frozen=True, slots=True)
class RowBlockCost:
    """Pairs of whole blocks of rows, each row with `overhead` keys more than it sees."""

    block: int = 128
    overhead: int = 164
    """Half a tile of 128 keys along the diagonal,
    and 100 keys for starting and ending a block (42 to 100 were measured)."""

    def of(self, bands: Bands) -> np.ndarray:
        pairs, rows = bands.area(), np.maximum(bands.q1 - bands.q0, 1)
        padded = -(-rows // self.block) * self.block
        return np.where(pairs > 0, pairs + pairs // rows * (padded - rows) + padded * self.overhead, 0)

    def to_words(self) -> list[int]:
        return [1, self.block, self.overhead]


@dataclass(frozen=True, slots=True)
class TableCost:
    """Picoseconds by linear interpolation between measured tiles of rows x keys, and on from the table's last two. More
    rows or keys never cost less."""

    rows: tuple[int, ...]
    """Ascending, at least two; fewer rows than the first cost as much as the first."""
    keys: tuple[int, ...]
    """Ascending, at least two; a task's keys are the mean over its rows."""
    picoseconds: tuple[tuple[int, ...], ...]
    """Of a tile of rows[i] x keys[j], all pairs allowed."""

    def __post_init__(self):
        for name, grid in (("rows", self.rows), ("keys", self.keys)):
            assert len(grid) >= 2 and grid[0] > 0, f"a table needs two or more {name}, got {grid}"
            assert all(a < b for a, b in zip(grid, grid[1:], strict=False)), f"{name} must ascend, got {grid}"
        shape = np.array(self.picoseconds).shape
        assert shape == (len(self.rows), len(self.keys)), f"{shape} times for {len(self.rows)} x {len(self.keys)}"
        assert np.array(self.picoseconds).min() > 0, "a time is not positive"
        assert all((np.diff(self.picoseconds, axis=i) >= 0).all() for i in (0, 1)), "more rows or keys cost less"

    def of(self, bands: Bands) -> np.ndarray:
        pairs, num_rows = bands.area(), np.maximum(bands.q1 - bands.q0, 1)
        grid_r, grid_k, times = (np.array(x, np.int64) for x in (self.rows, self.keys, self.picoseconds))
        rows, keys = np.maximum(num_rows, grid_r[0]), np.maximum(pairs // num_rows, grid_k[0])
        i = np.clip(np.searchsorted(grid_r, rows, side="right") - 1, 0, len(grid_r) - 2)
        j = np.clip(np.searchsorted(grid_k, keys, side="right") - 1, 0, len(grid_k) - 2)

        def at(i: np.ndarray) -> np.ndarray:
            return _between(times[i, j], times[i, j + 1], keys - grid_k[j], grid_k[j + 1] - grid_k[j])

        cost = _between(at(i), at(i + 1), rows - grid_r[i], grid_r[i + 1] - grid_r[i])
        return np.where(pairs > 0, np.maximum(cost, 1), 0)

    def to_words(self) -> list[int]:
        times = [t for row in self.picoseconds for t in row]
        return [2, len(self.rows), *self.rows, *self.keys, *times]


def cost_from_words(words: list[int]) -> Cost:
    kind, *rest = words
    if kind == 0:
        return PairCost()
    if kind == 1:
        return RowBlockCost(*rest)
    rows, keys = tuple(rest[1 : 1 + rest[0]]), len(rest[1 + rest[0] :]) // (rest[0] + 1)
    at = 1 + len(rows) + keys
    times = tuple(tuple(rest[at + i * keys : at + (i + 1) * keys]) for i in range(len(rows)))
    return TableCost(rows, tuple(rest[1 + len(rows) : at]), times)


def _between(low, high, part, whole):
    """low + (high - low) * part / whole; the quotient first, so that products stay below 2^63."""
    high = np.maximum(low, high)
    slope, rest = (high - low) // whole, (high - low) % whole
    return low + slope * part + rest * part // whole


@dataclass(frozen=True, slots=True)
class Wire:
    """What a moved row costs in the unit of a `Cost`, on the way that carries more."""

    far: tuple[int, int]
    """Of a query row, of a key/value row, between a rank and a server on another node."""
    near: tuple[int, int]
    """The same on one node."""
    ranks_per_node: int = 1
    """Ranks are on nodes in their order; dedicated servers are on nodes of their own."""


def model_flops(weights: int, tokens: int, attention_flops: float) -> float:
    """What a model's step takes, forward and backward, however it is computed: a product with each of `weights` per
    token, and `attention_flops` forward; backward needs twice as many. Recomputing counts nothing (PaLM, arXiv
    2204.02311, appendix B)."""
    return 3 * (2.0 * weights * tokens + attention_flops)


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """One layer's attention: query heads, key/value heads, head size, bytes of an element and of a statistic (LSE,
    delta). FLOPs and bytes as in the paper (arXiv 2510.18121, section 3)."""

    query_heads: int
    kv_heads: int
    head_dim: int
    element_bytes: int
    statistic_bytes: int = 4

    def flops(self, pairs: int, backward: bool = False) -> float:
        """Of attending `pairs` (query, key) pairs: two matrix products forward; five backward, where
        kernels recompute the scores."""
        return (10.0 if backward else 4.0) * pairs * self.query_heads * self.head_dim

    def wire_bytes(self, query_rows: int, kv_rows: int, backward: bool = False) -> int:
        """Both ways, of serving that many query and key/value rows away from their home."""
        there = self.bytes_to_server(query_rows, kv_rows, backward)
        return there + self.bytes_to_trainer(query_rows, kv_rows, backward)

    def bytes_to_server(self, query_rows: int, kv_rows: int, backward: bool = False) -> int:
        """Forward: q, k, v. Backward: q, d_out, lse, delta, k, v."""
        query, kv, statistic = self._row_bytes()
        return query_rows * (2 * (query + statistic) if backward else query) + kv_rows * 2 * kv

    def bytes_to_trainer(self, query_rows: int, kv_rows: int, backward: bool = False) -> int:
        """Forward: out, lse. Backward: dq, dk, dv."""
        query, kv, statistic = self._row_bytes()
        return query_rows * query + (kv_rows * 2 * kv if backward else query_rows * statistic)

    def _row_bytes(self) -> tuple[int, int, int]:
        per_head = self.head_dim * self.element_bytes
        return self.query_heads * per_head, self.kv_heads * per_head, self.query_heads * self.statistic_bytes
