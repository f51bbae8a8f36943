"""Every rank holds the same number of tokens, and together they hold each document's rows once, in order."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distca.placement import place


def tokens_of(lengths):
    """(document, row) of every token, in order."""
    return [(d, row) for d, length in enumerate(lengths) for row in range(length)]


def tokens_on(segments):
    """(rank, rank's own row, document, row) of every token that the segments hold, in their order."""
    columns = (segments.rank, segments.row, segments.document, segments.start, segments.end)
    for rank, row, document, start, end in zip(*(c.tolist() for c in columns), strict=True):
        yield from ((rank, row + i, document, start + i) for i in range(end - start))


@st.composite
def lengths_and_ranks(draw):
    """Document lengths, some zero, whose sum is a multiple of the number of ranks."""
    num_ranks = draw(st.integers(1, 9))
    lengths = draw(st.lists(st.one_of(st.just(0), st.integers(1, 4), st.integers(1, 300)), max_size=12))
    gap = -sum(lengths) % num_ranks
    lengths.insert(draw(st.integers(0, len(lengths))), gap)
    return lengths, num_ranks


@given(lengths_and_ranks())
def test_ranks_hold_equal_shares_that_tile_the_documents(case):
    lengths, num_ranks = case
    segments = place(np.array(lengths, np.int64), num_ranks)
    share = sum(lengths) // num_ranks
    held = list(tokens_on(segments))
    assert [(d, row) for _, _, d, row in held] == tokens_of(lengths), "each token once, in the documents' order"
    assert [(rank, own) for rank, own, _, _ in held] == [(r, row) for r in range(num_ranks) for row in range(share)]
    assert (segments.end > segments.start).all(), "no segment is empty"


@given(lengths_and_ranks())
def test_a_document_is_cut_only_where_a_rank_ends(case):
    lengths, num_ranks = case
    segments = place(np.array(lengths, np.int64), num_ranks)
    cut = segments.end < np.array(lengths)[segments.document]
    share = sum(lengths) // num_ranks
    assert (segments.row[cut] + (segments.end - segments.start)[cut] == share).all()
    per_rank = [segments.of_rank(rank) for rank in range(num_ranks)]
    assert sum(len(s.row) for s in per_rank) == len(segments.row)
    assert all((s.rank == rank).all() for rank, s in enumerate(per_rank))


@given(lengths_and_ranks())
def test_documents_without_tokens_change_nothing_but_numbers(case):
    lengths, num_ranks = case
    full = np.flatnonzero(lengths)
    a, b = place(np.array(lengths, np.int64), num_ranks), place(np.array(lengths, np.int64)[full], num_ranks)
    assert np.array_equal(a.document, full[b.document])
    assert all(np.array_equal(getattr(a, c), getattr(b, c)) for c in ("start", "end", "rank", "row"))


def test_one_giant_document_becomes_a_stripe_per_rank():
    segments = place(np.array([8_000_000], np.int64), 64)
    assert segments.rank.tolist() == list(range(64)) and (segments.document == 0).all() and (segments.row == 0).all()
    assert (segments.end - segments.start == 125_000).all() and (segments.start == 125_000 * segments.rank).all()


def test_a_giant_between_small_documents_keeps_them_whole():
    segments = place(np.array([3, 1000, 0, 5], np.int64), 4)
    assert [tuple(x) for x in zip(segments.document, segments.start, segments.end, segments.rank, strict=True)] == [
        (0, 0, 3, 0),
        (1, 0, 249, 0),
        (1, 249, 501, 1),
        (1, 501, 753, 2),
        (1, 753, 1000, 3),
        (3, 0, 5, 3),
    ]


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]], ids=str)
def test_nothing_to_place_is_no_segment(lengths):
    assert len(place(np.array(lengths, np.int64), 3).rank) == 0


def test_tokens_that_cannot_be_shared_equally_are_refused():
    with pytest.raises(AssertionError, match="10 tokens cannot be shared equally by 3 ranks"):
        place(np.array([4, 6], np.int64), 3)


def test_lengths_of_any_integer_type_are_exact():
    lengths = np.full(3, 2**31 - 1, np.int32)
    segments = place(lengths, 3)
    assert segments.end.dtype == np.int64 and (segments.end == 2**31 - 1).all()
