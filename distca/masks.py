"""Which keys does a query row see?

A mask is a list of *bands*. One band is a rectangle of query rows [q0, q1) x key columns [k0, k1) with two diagonals:

    row q of the band, i = q - q0, sees the keys k with   i + lo <= k - k0 <= i + hi   and   k0 <= k < k1

          k0                k1              causal document      lo = -inf   hi = 0
       q0  x x . . . . . . .                sliding window W     lo = 1 - W  hi = 0
           x x x . . . . . .                full                 lo = -inf   hi = +inf
           . x x x . . . . .   lo = -1
       q1  . . x x x . . . .   hi = 1

Bands are the one mask language that is closed under cutting (a piece of a band is a band, `cut`) and whose area is
exact in integers (`area`): the planner needs both. `UNBOUNDED` stands for infinity; all columns are int64.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from distca.arrays import spread

UNBOUNDED = 1 << 40  # further than any document is long, and far enough from 2^63 that sums of a few cannot overflow


@dataclass(frozen=True, slots=True)
class Bands:
    """Columns of equal length, one entry per band.
    Rows and keys count from wherever the owner says (a document, a buffer)."""

    q0: np.ndarray  # (B,) int64, first query row
    q1: np.ndarray  # (B,) int64, one past the last query row
    k0: np.ndarray  # (B,) int64, first key
    k1: np.ndarray  # (B,) int64, one past the last key
    lo: np.ndarray  # (B,) int64, first key of row i is k0 + i + lo
    hi: np.ndarray  # (B,) int64, last key of row i is k0 + i + hi

    @staticmethod
    def of(*rows: tuple[int, int, int, int, int, int]) -> Bands:
        """Bands from (q0, q1, k0, k1, lo, hi) rows, for people and tests."""
        return Bands(*np.array(rows, dtype=np.int64).reshape(-1, 6).T)

    def rows(self) -> list[tuple[int, int, int, int, int, int]]:
        """The bands as (q0, q1, k0, k1, lo, hi) in Python integers, in order: what `of` took."""
        return list(zip(*(getattr(self, f.name).tolist() for f in fields(self)), strict=True))

    def to_bytes(self) -> bytes:
        """For those who keep what they have made of a task list: equal bands, equal bytes."""
        return np.stack([getattr(self, f.name) for f in fields(self)]).tobytes()

    @staticmethod
    def from_bytes(data: bytes) -> Bands:
        """What `to_bytes` was called on; its columns cannot be written to."""
        return Bands(*np.frombuffer(data, np.int64).reshape(6, -1))

    def __len__(self) -> int:
        return len(self.q0)

    def __getitem__(self, index) -> Bands:
        """The bands that `index` (a slice, mask or integer array) selects."""
        if isinstance(index, np.ndarray) and index.dtype == bool:
            index = np.flatnonzero(index)  # once for all columns
        return Bands(*(getattr(self, f.name)[index] for f in fields(self)))

    def area(self) -> np.ndarray:
        """(B,) int64: how many (query, key) pairs each band allows, exactly."""
        rows, keys = self.q1 - self.q0, self.k1 - self.k0
        pairs = _pairs_at_or_below(rows, keys, self.hi)
        if (self.lo > 1 - rows).any():  # in a causal mask no row starts later than its band
            pairs -= _pairs_at_or_below(rows, keys, self.lo - 1)
        return np.maximum(pairs, 0)  # hi < lo allows nothing


@dataclass(frozen=True, slots=True, order=True)
class MaskRule:
    """The mask that a model's layer asks for, the same in every document: causal, or causal with a sliding window.

    A new rule is a new field here with its bands in `bands_of`, a word in messages (`PlanInputs.to_words`,
    `link.Header`), and a row in the parity test's table."""

    window: int = 0
    """Keys a row sees, itself included; 0 means all before it."""

    def __str__(self) -> str:
        return f"sliding window of {self.window}" if self.window else "causal"


def bands_of(rule: MaskRule, lengths: np.ndarray) -> Bands:
    """One band per document, in the document's own rows: (documents,) int64 lengths -> Bands. Every row sees a key, and
    every key is seen: a rule's bands are tight."""
    lengths = np.asarray(lengths, np.int64)
    zero = np.zeros_like(lengths)
    lo = np.full_like(lengths, 1 - rule.window if rule.window else -UNBOUNDED)
    return Bands(zero, lengths, zero, lengths, lo, zero)


@dataclass(frozen=True, slots=True, eq=False)
class Mask:
    """The pairs that a batch allows, for masks of one or more bands per document; no pair is in two bands. Equal only
    to itself."""

    document: np.ndarray  # (M,) int64, ascending
    bands: Bands  # (M,) in the document's own rows

    def __post_init__(self):
        assert (np.diff(self.document) >= 0).all(), "bands of a document are side by side, documents in their order"

    def of_documents(self, order: np.ndarray) -> Mask:
        """The mask of the documents `order`, numbered anew from 0."""
        first = np.searchsorted(self.document, order)
        count = np.searchsorted(self.document, order, side="right") - first
        document, nth = spread(count)
        return Mask(document, self.bands[first[document] + nth])


def mask_of(rule: MaskRule | Mask, lengths: np.ndarray) -> Mask:
    """A rule's bands, document by document; a mask is returned as it is."""
    return rule if isinstance(rule, Mask) else Mask(np.arange(len(lengths)), bands_of(rule, lengths))


def prefix_mask(lengths: np.ndarray, prefix: np.ndarray) -> Mask:
    """Every row sees the first `prefix` keys of its document, (documents,) int64; the other rows are causal."""
    zero, far = np.zeros_like(lengths), np.full_like(lengths, UNBOUNDED)
    prefix = np.minimum(prefix, lengths)
    return _interleave(
        Bands(zero, lengths, zero, prefix, -far, far), Bands(prefix, lengths, prefix, lengths, -far, zero)
    )


def sink_mask(lengths: np.ndarray, sinks: int, window: int) -> Mask:
    """A row sees the `window` keys up to its own, and the document's first `sinks` keys (StreamingLLM,
    arXiv 2309.17453)."""
    assert window > 0, "a row sees at least its own key"
    zero, far = np.zeros_like(lengths), np.full_like(lengths, UNBOUNDED)
    first = Bands(zero, lengths, zero, np.minimum(sinks, lengths), -far, zero - window)
    mask = _interleave(first, bands_of(MaskRule(window), lengths))
    return Mask(mask.document, tighten(mask.bands))


def chunk_mask(lengths: np.ndarray, chunk: int) -> Mask:
    """A row sees the keys up to its own of the `chunk` rows that it is one of (Llama 4)."""
    assert chunk > 0, "a chunk has at least one row"
    document, nth = spread(-(-lengths // chunk))
    start = nth * chunk
    end = np.minimum(start + chunk, lengths[document])
    return Mask(document, Bands(start, end, start, end, np.full_like(start, -UNBOUNDED), np.zeros_like(start)))


def _interleave(*bands: Bands) -> Mask:
    """Several bands per document, each argument with one for every document."""
    columns = (np.stack([getattr(b, f.name) for b in bands], 1).ravel() for f in fields(Bands))
    return Mask(np.repeat(np.arange(len(bands[0])), len(bands)), Bands(*columns))


def cut(bands: Bands, q0, q1, k0, k1) -> Bands:
    """The part of each band inside the rectangle [q0, q1) x [k0, k1), shrunk to the rows and keys that still see each
    other.

    Bounds are scalars or (B,) arrays. A band with nothing inside becomes empty (q0 == q1 and k0 == k1)."""
    return tighten(crop(bands, q0, q1, k0, k1))


def crop(bands: Bands, q0, q1, k0, k1) -> Bands:
    """The part of each band inside the rectangle [q0, q1) x [k0, k1), with the rectangle's own edges."""
    q0, q1 = _clamp(q0, bands.q0, bands.q1), _clamp(q1, bands.q0, bands.q1)  # an empty part stays inside its band
    return _rebase(bands, q0, q1, _clamp(k0, bands.k0, bands.k1), _clamp(k1, bands.k0, bands.k1))


def intersect(a: Bands, b: Bands) -> Bands:
    """The pairs that are in both, entry by entry; columns broadcast against each other."""
    q0, q1 = np.maximum(a.q0, b.q0), np.minimum(a.q1, b.q1)
    k0, k1 = np.maximum(a.k0, b.k0), np.minimum(a.k1, b.k1)
    a, b = _rebase(a, q0, q1, k0, k1), _rebase(b, q0, q1, k0, k1)
    return Bands(a.q0, a.q1, a.k0, a.k1, np.maximum(a.lo, b.lo), np.minimum(a.hi, b.hi))


def tighten(bands: Bands) -> Bands:
    """The same pairs in the smallest rectangle: rows that see no key,
    and keys that no row sees, are dropped from the edges."""
    rows, keys = bands.q1 - bands.q0, bands.k1 - bands.k0
    first_row = np.maximum(0, -bands.hi)  # below it i + hi < 0: left of every key
    last_row = np.minimum(rows - 1, keys - 1 - bands.lo)  # beyond it i + lo >= keys: right of every key
    first_key = np.maximum(0, first_row + bands.lo)
    last_key = np.minimum(keys - 1, last_row + bands.hi)
    some = (rows > 0) & (keys > 0) & (last_row >= first_row) & (last_key >= first_key) & (bands.hi >= bands.lo)
    q0, k0 = bands.q0 + first_row * some, bands.k0 + first_key * some
    q1, k1 = q0 + (last_row + 1 - first_row) * some, k0 + (last_key + 1 - first_key) * some
    return _rebase(bands, q0, q1, k0, k1)


def join(*bands: Bands) -> Bands:
    """All of them, in this order."""
    return Bands(*(np.concatenate([getattr(b, f.name) for b in bands]) for f in fields(Bands)))


def transpose(bands: Bands) -> Bands:
    """The same pairs with rows and keys in each other's place: which rows see a key."""
    return Bands(bands.k0, bands.k1, bands.q0, bands.q1, -bands.hi, -bands.lo)


def _rebase(bands: Bands, q0, q1, k0, k1) -> Bands:
    """The same diagonals seen from another corner."""
    shift = (q0 - bands.q0) - (k0 - bands.k0)
    moved = lambda x: x + shift * (np.abs(x) < UNBOUNDED // 2)  # noqa: E731 - infinity stays infinity
    return Bands(q0, np.maximum(q0, q1), k0, np.maximum(k0, k1), moved(bands.lo), moved(bands.hi))


def _pairs_at_or_below(rows: np.ndarray, keys: np.ndarray, x: np.ndarray) -> np.ndarray:
    """How many pairs (i, j), 0 <= i < rows, 0 <= j < keys, have j <= i + x: a sum of clamp(i + x + 1, 0, keys)."""
    first = _clamp(-x, 0, rows)  # rows before see nothing
    last = _clamp(keys - x, first, rows)  # rows from here on see every key
    ramp = (last - first) * (first + last + (2 * x + 1)) >> 1  # rows between see one key more each
    return ramp + (rows - last) * keys


def _clamp(x, low, high):
    """Like np.clip, at half its cost for short columns."""
    return np.minimum(np.maximum(x, low), high)
