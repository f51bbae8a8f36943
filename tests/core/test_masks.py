"""Bands say exactly which pairs they allow, however they are cut: everything is held to the painter."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from masks_painted import count, paint

from distca.masks import (
    UNBOUNDED,
    Bands,
    MaskRule,
    bands_of,
    chunk_mask,
    crop,
    cut,
    intersect,
    mask_of,
    prefix_mask,
    sink_mask,
    tighten,
)

ROWS, KEYS = 18, 20

diagonals = st.one_of(st.sampled_from([-UNBOUNDED, UNBOUNDED]), st.integers(-25, 25))


@st.composite
def bands(draw, at_most: int = 3) -> Bands:
    def band():
        q0, q1 = sorted(draw(st.tuples(st.integers(0, ROWS), st.integers(0, ROWS))))
        k0, k1 = sorted(draw(st.tuples(st.integers(0, KEYS), st.integers(0, KEYS))))
        return q0, q1, k0, k1, draw(diagonals), draw(diagonals)

    return Bands.of(*(band() for _ in range(draw(st.integers(0, at_most)))))


rectangles = st.tuples(*(st.integers(0, n) for n in (ROWS, ROWS, KEYS, KEYS)))


@given(bands())
def test_area_is_the_painted_count(some):
    painted = [paint(some[i : i + 1], ROWS, KEYS).sum() for i in range(len(some))]
    assert some.area().tolist() == painted


@pytest.mark.parametrize("rows, keys, lo, hi", [(10**7, 10**7, -UNBOUNDED, 0), (10**7, 10**7, 1 - 4096, 0)], ids=str)
def test_area_of_a_document_of_ten_million_rows_is_exact(rows, keys, lo, hi):
    window = min(rows, 1 - lo)
    expected = window * (window + 1) // 2 + (rows - window) * window
    assert Bands.of((0, rows, 0, keys, lo, hi)).area().tolist() == [expected]


@given(bands(), rectangles)
def test_cut_and_crop_keep_exactly_the_pairs_inside_the_rectangle(some, rectangle):
    q0, q1, k0, k1 = rectangle
    inside = count(some, ROWS, KEYS)
    inside[:q0], inside[max(q0, q1) :], inside[:, :k0], inside[:, max(k0, k1) :] = 0, 0, 0, 0
    for piece in (cut(some, *rectangle), crop(some, *rectangle)):
        assert np.array_equal(count(piece, ROWS, KEYS), inside)
        assert ((some.q0 <= piece.q0) & (piece.q0 <= piece.q1) & (piece.q1 <= some.q1)).all(), "empty pieces too"
        assert ((some.k0 <= piece.k0) & (piece.k0 <= piece.k1) & (piece.k1 <= some.k1)).all()


@given(bands())
def test_tighten_keeps_the_pairs_and_leaves_no_empty_edge(some):
    tight = tighten(some)
    assert np.array_equal(count(tight, ROWS, KEYS), count(some, ROWS, KEYS))
    for i, (q0, q1, k0, k1, _, _) in enumerate(tight.rows()):
        cells = paint(tight[i : i + 1], ROWS, KEYS)[q0:q1, k0:k1]
        assert (q0 == q1) == (k0 == k1), "an empty band is empty both ways"
        assert cells.any(axis=1).all() and cells.any(axis=0).all(), "each row sees a key and each key is seen"


@given(bands(), st.lists(st.integers(0, ROWS), max_size=3), st.lists(st.integers(0, KEYS), max_size=3))
def test_pieces_of_a_grid_of_cuts_tile_the_bands(some, row_cuts, key_cuts):
    edges_q, edges_k = sorted({0, ROWS, *row_cuts}), sorted({0, KEYS, *key_cuts})
    total = np.zeros((ROWS, KEYS), np.int64)
    area = 0
    for top, bottom in zip(edges_q, edges_q[1:], strict=False):
        for left, right in zip(edges_k, edges_k[1:], strict=False):
            piece = cut(some, top, bottom, left, right)
            total += count(piece, ROWS, KEYS)
            area += piece.area().sum()
    assert np.array_equal(total, count(some, ROWS, KEYS))
    assert area == some.area().sum()


@given(bands(), rectangles, rectangles)
def test_infinity_stays_infinity_however_often_a_band_is_cut(some, first, second):
    piece = cut(cut(some, *first), *second)
    for before, after in ((some.lo, piece.lo), (some.hi, piece.hi)):
        infinite = np.abs(before) == UNBOUNDED
        assert np.array_equal(after[infinite], before[infinite])
        assert (np.abs(after[~infinite]) < UNBOUNDED // 2).all()


@settings(max_examples=30)
@given(st.integers(0, 12), st.lists(st.integers(0, 12), max_size=4))
def test_a_rule_gives_each_document_its_causal_window(window, lengths):
    for band, length in zip(bands_of(MaskRule(window), lengths).rows(), lengths, strict=True):
        i, j = np.ogrid[:length, :length]
        assert np.array_equal(paint(Bands.of(band), length, length), (j <= i) & (i - j < (window or length + 1)))


def test_rows_gives_back_what_of_took():
    rows = [(0, 3, 1, 4, -UNBOUNDED, 0), (5, 5, 2, 2, 1, UNBOUNDED)]
    assert Bands.of(*rows).rows() == rows
    assert Bands.of().rows() == []


@given(bands(), bands())
def test_an_intersection_has_the_pairs_of_both(some, others):
    a, b = np.meshgrid(np.arange(len(some)), np.arange(len(others)))
    both = intersect(some[a.ravel()], others[b.ravel()])
    for i, (x, y) in enumerate(zip(a.ravel(), b.ravel(), strict=True)):
        wanted = paint(some[x : x + 1], ROWS, KEYS) & paint(others[y : y + 1], ROWS, KEYS)
        assert np.array_equal(paint(both[i : i + 1], ROWS, KEYS), wanted)


MASKS = {  # does row q of a document see key k?
    "prefix": (lambda n: prefix_mask(n, n // 3), lambda q, k, n: k <= q or k < n // 3),
    "sinks and window": (lambda n: sink_mask(n, 2, 5), lambda q, k, n: k <= q and (k < 2 or q - k < 5)),
    "chunks": (lambda n: chunk_mask(n, 7), lambda q, k, n: k <= q and q // 7 == k // 7),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_of_several_bands_allow_each_pair_once(name):
    make, sees = MASKS[name]
    lengths = np.array([0, 1, 2, 6, 7, 8, 20])
    mask = make(lengths)
    assert (np.diff(mask.document) >= 0).all()
    for document, length in enumerate(lengths.tolist()):
        wanted = [[sees(q, k, length) for k in range(length)] for q in range(length)]
        counted = count(mask.bands[mask.document == document], length, length)
        assert np.array_equal(counted, np.array(wanted, np.int64).reshape(length, length))


def test_documents_of_a_mask_are_numbered_anew():
    lengths = np.array([20, 3, 9])
    mask = prefix_mask(lengths, np.array([5, 1, 0]))
    chosen = mask.of_documents(np.array([2, 0]))
    assert chosen.document.tolist() == [0, 0, 1, 1]
    assert chosen.bands.rows() == mask.bands[[4, 5, 0, 1]].rows()
    assert mask_of(mask, lengths) is mask
