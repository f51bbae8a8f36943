"""Which documents does a micro-batch hold?

Training reads an endless sequence of documents. Its entry i is a pure function of (seed, i): weighted sources are
interleaved by a fixed cycle, and each source is read epoch after epoch, in another order every time. Nothing depends on
the number of ranks and no shuffled table is stored: the state of the data is one `Cursor`, and resuming costs nothing.

    order = DocumentOrder(seed=0, num_documents=[1000, 50], rates=[3, 1])
    pieces, cursor = next_pieces(order, lengths, Cursor(), tokens=8192, max_document_tokens=8192)

What the tests hold this file to:
  - `permuted` is a permutation for every n and key, and never changes: a stored cursor keeps its meaning;
  - within an epoch each document of a source comes exactly once;
  - a micro-batch holds exactly `tokens` tokens, and the micro-batches in a row hold the documents' tokens in a row.

Only integers decide here, so that every machine agrees.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from fractions import Fraction

import numpy as np

CYCLE = 55440  # slots that sources share: enough for 1 % of one document in a thousand; 1 to 12 divide it
ROUNDS = 6  # of the Feistel network; four already pass for random, and tiny domains gain from two more


@dataclass(frozen=True, slots=True)
class Cursor:
    """Where the next micro-batch begins: in the endless order, `offset` tokens into entry `document`."""

    document: int = 0
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Pieces:
    """The documents of one micro-batch, in order: each a token range of a stored document that trains as a document."""

    source: np.ndarray  # (P,) int64
    row: np.ndarray  # (P,) int64, number of the stored document within its source
    start: np.ndarray  # (P,) int64, first token of the stored document
    end: np.ndarray  # (P,) int64, one past the last token
    epoch: np.ndarray  # (P,) int64, how often the source had been read completely before

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index) -> Pieces:
        """The pieces that `index` (a slice, mask or integer array) selects."""
        return Pieces(*(getattr(self, f.name)[index] for f in fields(self)))

    @property
    def lengths(self) -> np.ndarray:
        """(P,) int64 tokens."""
        return self.end - self.start


class DocumentOrder:
    """The endless sequence of documents over all sources.

    `rates` are documents per source relative to one another; they are met within one slot of `CYCLE`, evenly spread,
    and each source has at least one slot. Integers and fractions are exact; floats are taken at their exact value."""

    def __init__(self, seed: int, num_documents: Sequence[int], rates: Sequence[Fraction | float]):
        assert len(num_documents) == len(rates) and min(num_documents) > 0, f"{num_documents} at {rates}"
        self._seed = seed
        self._num_documents = np.array(num_documents, np.int64)
        self._slots = _share_slots(rates)
        self._slot_source, self._slot_turn = _spread(self._slots)

    def at(self, indices) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Entries `indices` (N,) of the sequence as (source, epoch, row), int64 (N,) each."""
        cycle, slot = np.divmod(np.asarray(indices, np.int64), len(self._slot_source))
        source = self._slot_source[slot]
        num_documents = self._num_documents[source]
        epoch, index = np.divmod(cycle * self._slots[source] + self._slot_turn[slot], num_documents)
        return source, epoch, permuted(index, num_documents, _key(self._seed, source, epoch))


def next_pieces(
    order: DocumentOrder, lengths: Sequence[np.ndarray], cursor: Cursor, tokens: int, max_document_tokens: int
) -> tuple[Pieces, Cursor]:
    """The micro-batch of exactly `tokens` tokens that begins at `cursor`, and where the next one begins.

    `lengths[source][row]` is a stored document's length, at least 1. A document longer than `max_document_tokens`
    becomes several pieces of that size. The last one is cut where the micro-batch is full, and what is left of its
    document begins the next micro-batch, as a document."""
    source, epoch, row, length = _documents_holding(order, lengths, cursor, tokens)
    begin = np.zeros_like(length)
    begin[0] = cursor.offset
    end = length.copy()
    surplus = int((end - begin).sum()) - tokens
    end[-1] -= surplus
    following = cursor.document + len(length)
    next_cursor = Cursor(following - 1, int(end[-1])) if surplus else Cursor(following, 0)

    num_pieces = -(-(end - begin) // max_document_tokens)
    document = np.repeat(np.arange(len(length)), num_pieces)
    part = np.arange(len(document)) - np.repeat(np.cumsum(num_pieces) - num_pieces, num_pieces)
    start = begin[document] + part * max_document_tokens
    stop = np.minimum(start + max_document_tokens, end[document])
    return Pieces(source[document], row[document], start, stop, epoch[document]), next_cursor


def permuted(index, n, key) -> np.ndarray:
    """Entry `index` of a pseudo-random permutation of 0 … n - 1; arguments broadcast, the result is an int64 array.

    A Feistel network permutes the smallest domain of 4^b >= n numbers, whatever its round function; applying it until
    the result is below n ("cycle walking") permutes 0 … n - 1. See Black and Rogaway, *Ciphers with Arbitrary Finite
    Domains*, 2002."""
    arguments = (np.asarray(argument).astype(np.uint64) for argument in (index, n, key))
    value, n, key = np.broadcast_arrays(*arguments)
    shape, value, n, key = value.shape, value.flatten(), n.ravel(), key.ravel()
    half_bits = _half_bits(n)
    walking = np.arange(value.size)
    while walking.size:
        value[walking] = _feistel(value[walking], half_bits[walking], key[walking])
        walking = walking[value[walking] >= n[walking]]
    return value.astype(np.int64).reshape(shape)


def _feistel(value: np.ndarray, half_bits: np.ndarray, key: np.ndarray) -> np.ndarray:
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = value >> half_bits, value & mask
    for _ in range(ROUNDS):
        key = _mix(key)
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return left << half_bits | right


def _half_bits(n: np.ndarray) -> np.ndarray:
    """The smallest b with 4^b >= n."""
    bits, largest = np.zeros_like(n), n - np.uint64(1)
    while largest.any():
        bits += largest > 0
        largest = largest >> np.uint64(2)
    return bits


def _key(seed: int, source: np.ndarray, epoch: np.ndarray) -> np.ndarray:
    """A key per (seed, source, epoch)."""
    key = _mix(np.full(source.shape, seed % (1 << 64), np.uint64))
    return _mix(_mix(key ^ source.astype(np.uint64)) ^ epoch.astype(np.uint64))


def _mix(x: np.ndarray) -> np.ndarray:
    """One step of SplitMix64 (Steele, Lea and Flood, 2014): every input bit changes half of the 64 output bits."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _share_slots(rates: Sequence[Fraction | float]) -> np.ndarray:
    """(sources,) int64, each at least 1: proportional shares of `CYCLE`, the largest remainders rounded up, reduced."""
    assert len(rates) <= CYCLE and min(rates) > 0, f"rates {rates}"
    exact = [Fraction(rate) for rate in rates]
    total = sum(exact)
    wanted = [rate * CYCLE / total for rate in exact]
    slots = [max(1, int(share)) for share in wanted]
    while (missing := CYCLE - sum(slots)) != 0:
        step = 1 if missing > 0 else -1
        most_wrong = sorted(range(len(slots)), key=lambda s: (step * (slots[s] - wanted[s]), s))
        for s in [s for s in most_wrong if slots[s] + step >= 1][: abs(missing)]:
            slots[s] += step
    return np.array(slots, np.int64) // math.gcd(*slots)


def _spread(slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each slot's source, and its turn among that source's slots: int64 each, every source evenly spread."""
    source = np.repeat(np.arange(len(slots)), slots)
    turn = np.arange(len(source)) - np.repeat(np.cumsum(slots) - slots, slots)
    when = ((2 * turn + 1) << 40) // (2 * slots[source])  # the middle of the turn-th equal part of the cycle
    by_time = np.argsort(when, kind="stable")
    return source[by_time], turn[by_time]


def _documents_holding(
    order: DocumentOrder, lengths: Sequence[np.ndarray], cursor: Cursor, tokens: int
) -> list[np.ndarray]:
    """The fewest documents from `cursor` on that hold `tokens` tokens, as columns source, epoch, row, length."""
    assert tokens > 0, f"{tokens} tokens asked for"
    columns = [np.empty(0, np.int64)] * 4
    held, num_more = -cursor.offset, 64
    while held < tokens:
        first = cursor.document + len(columns[0])
        source, epoch, row = order.at(np.arange(first, first + num_more))
        length = _lengths_at(lengths, source, row)
        assert length.min() > 0, f"source {source[length.argmin()]}, document {row[length.argmin()]} is empty"
        columns = [np.concatenate(pair) for pair in zip(columns, (source, epoch, row, length), strict=True)]
        held += int(length.sum())
        num_more = len(columns[0])
    assert cursor.offset < columns[3][0], f"{cursor} is beyond its document of {columns[3][0]} tokens"
    num_documents = int(np.searchsorted(np.cumsum(columns[3]), tokens + cursor.offset)) + 1
    return [column[:num_documents] for column in columns]


def _lengths_at(lengths: Sequence[np.ndarray], source: np.ndarray, row: np.ndarray) -> np.ndarray:
    found = np.empty(len(row), np.int64)
    for s in np.unique(source):
        found[source == s] = lengths[s][row[source == s]]
    return found
