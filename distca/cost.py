"""What does a plan cost: FLOPs of attention, bytes on the wire?

Loads are compared in (query, key) pairs, which are exact integers; this file turns pairs and rows into the units people
know. Formulas: notes of the paper (arXiv 2510.18121), section 3: 4 D FLOPs per pair and query head forward, 2.5 times
that backward."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """One layer's attention: query heads, key/value heads, head size, bytes of an element and of a statistic (LSE,
    delta)."""

    query_heads: int
    kv_heads: int
    head_dim: int
    element_bytes: int
    statistic_bytes: int = 4

    def flops(self, pairs: int, backward: bool = False) -> float:
        """Of attending `pairs` (query, key) pairs: two matrix products forward, five backward."""
        return (10.0 if backward else 4.0) * pairs * self.query_heads * self.head_dim

    def wire_bytes(self, query_rows: int, kv_rows: int) -> int:
        """Forward and backward, both ways, of serving that many query and key/value rows away from their home.

        Forward: q, k, v out; out, lse back. Backward: q, k, v, d_out, lse, delta out; dq, dk, dv back."""
        query, kv = (
            self.query_heads * self.head_dim * self.element_bytes,
            self.kv_heads * self.head_dim * self.element_bytes,
        )
        statistics = 3 * self.query_heads * self.statistic_bytes
        return query_rows * (5 * query + statistics) + kv_rows * 6 * kv
