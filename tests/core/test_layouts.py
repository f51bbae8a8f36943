"""Layouts that ours is compared with: every row of every document lies somewhere, once, and where it should."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distca.layouts import in_order, tasks_of, whole_documents, zigzag
from distca.masks import MaskRule, bands_of

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=12).map(np.array)


def assert_each_row_lies_once(segments, lengths, ranks):
    held = [np.zeros(length, int) for length in lengths]
    for document, start, end in zip(segments.document, segments.start, segments.end, strict=True):
        assert start < end
        held[document][start:end] += 1
    assert all((rows == 1).all() for rows in held)
    for rank in range(ranks):
        own = segments.of_rank(rank)
        assert own.row.tolist() == (np.cumsum(own.end - own.start) - (own.end - own.start)).tolist()
    assert len(segments.rank) == 0 or (0 <= segments.rank.min() and segments.rank.max() < ranks)


@given(LENGTHS, st.integers(1, 5))
def test_whole_documents_lie_whole_and_no_rank_is_fuller_than_it_must_be(lengths, ranks):
    segments = whole_documents(lengths, ranks)
    assert_each_row_lies_once(segments, lengths, ranks)
    assert len(segments.rank) == len(lengths)
    held = np.bincount(segments.rank, segments.end - segments.start, ranks)
    assert held.max() <= lengths.sum() / ranks + lengths.max()


@given(LENGTHS, st.integers(1, 5))
def test_documents_in_order_fill_ranks_equally(lengths, ranks):
    lengths = np.append(lengths, -lengths.sum() % ranks + ranks)
    segments = in_order(lengths, ranks)
    assert_each_row_lies_once(segments, lengths, ranks)
    assert set(np.bincount(segments.rank, segments.end - segments.start, ranks)) == {lengths.sum() // ranks}
    assert (np.diff(segments.document) >= 0).all()


@given(LENGTHS, st.integers(1, 5), st.integers(1, 30))
def test_zigzag_chunks_come_first_and_short_documents_stay_whole(lengths, ranks, shortest):
    segments = zigzag(lengths, ranks, shortest)
    assert_each_row_lies_once(segments, lengths, ranks)
    is_long = (lengths >= max(shortest, 2 * ranks))[segments.document]
    assert (segments.end - segments.start)[~is_long].tolist() == lengths[segments.document[~is_long]].tolist()
    for rank in range(ranks):
        own = is_long[segments.rank == rank]
        assert (own == np.sort(own)[::-1]).all()


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_zigzag_ranks_have_about_equal_work(ranks):
    lengths = np.array([4800, 2400])
    segments = zigzag(lengths, ranks, 8)
    area = [
        int(tasks_of(MaskRule(), lengths, segments.of_rank(r), 0 * segments.of_rank(r).row).area().sum())
        for r in range(ranks)
    ]
    assert max(area) / min(area) < 1.001
    assert sum(area) == bands_of(MaskRule(), lengths).area().sum()


def test_tasks_are_in_a_ranks_own_rows_and_keys():
    lengths = np.array([10, 6])
    own = in_order(lengths, 2).of_rank(1)
    causal = tasks_of(MaskRule(), lengths, own, np.array([100, 200]))
    assert causal.rows()[0] == (0, 2, 100, 110, causal.lo[0], 8)
    assert causal.rows()[1][:4] == (2, 8, 200, 206)
    window = tasks_of(MaskRule(3), lengths, own, np.array([100, 200]))
    assert window.rows()[0] == (0, 2, 106, 110, 0, 2)
