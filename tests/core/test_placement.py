"""Every rank holds the same number of tokens, and together they hold each document's rows once, in order."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distca.arrays import sum_by
from distca.placement import num_stripes, packed_in_order, place


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


def place_evenly(lengths, num_ranks, group=4, block=128):
    """Placement of causal documents, longest first, on ranks of equal size and speed."""
    lengths = np.sort(np.array(lengths, np.int64))[::-1]
    work = lengths * (lengths + 1) // 2
    share = np.full(num_ranks, -(-int(work.sum()) // num_ranks), np.int64)
    return lengths, place(lengths, work, share, np.full(num_ranks, lengths.sum() // num_ranks), group, block)


@given(lengths_and_ranks(), st.sampled_from([1, 4, 8]), st.sampled_from([16, 128]))
def test_ranks_hold_equal_shares_that_tile_the_documents(case, group, block):
    lengths, segments = place_evenly(*case, group, block)
    share = int(lengths.sum()) // case[1]
    held = list(tokens_on(segments))
    assert sorted((d, row) for _, _, d, row in held) == tokens_of(lengths), "each token once"
    assert [(rank, own) for rank, own, _, _ in held] == [(r, row) for r in range(case[1]) for row in range(share)]
    assert (segments.end > segments.start).all(), "no segment is empty"


@given(lengths_and_ranks())
def test_segments_of_ranks_are_all_segments(case):
    _, segments = place_evenly(*case)
    per_rank = [segments.of_rank(rank) for rank in range(case[1])]
    assert sum(len(s.row) for s in per_rank) == len(segments.row)
    assert all((s.rank == rank).all() for rank, s in enumerate(per_rank))


@given(st.lists(st.integers(0, 60), max_size=12), st.integers(1, 9))
def test_documents_packed_in_order_lie_end_to_end_on_equal_ranks(lengths, num_ranks):
    segments = packed_in_order(np.array(lengths, np.int64), num_ranks)
    bounds = [rank * sum(lengths) // num_ranks for rank in range(num_ranks + 1)]
    places = [(rank, row) for rank in range(num_ranks) for row in range(bounds[rank + 1] - bounds[rank])]
    assert list(tokens_on(segments)) == [(*at, *token) for at, token in zip(places, tokens_of(lengths), strict=True)]
    assert (segments.end > segments.start).all()


def test_one_giant_document_is_shared_by_all_ranks():
    _, segments = place_evenly([8_000_000], 64)
    assert set(segments.rank.tolist()) == set(range(64))


def test_balanced_documents_are_not_cut():
    _, segments = place_evenly([512] * 32, 8)
    assert len(segments.row) == 32


def loads_of(lengths, num_ranks, group=4):
    """(ranks,) pairs that each rank would attend at home, in shares."""
    lengths, s = place_evenly(lengths, num_ranks, group)
    pairs = sum_by(s.rank, (s.end * (s.end + 1) - s.start * (s.start + 1)) // 2, num_ranks)
    return pairs / pairs.mean()


@pytest.mark.parametrize("num_ranks", [4, 8, 32])
@pytest.mark.parametrize("seed", range(3))
def test_many_documents_of_less_than_a_share_are_placed_almost_evenly(num_ranks, seed):
    """A document for which no rank has room once kept all later ones from being placed by their work."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(7.2, 1.1, 60 * num_ranks).astype(np.int64), 16, 30_000)
    lengths[-1] += -int(lengths.sum()) % num_ranks
    loads = loads_of(lengths, num_ranks)
    assert np.maximum(loads - 1, 0).sum() < 0.04 * num_ranks


def test_stripes_that_would_not_fit_on_a_rank_become_pairs():
    """One document of nearly all rows: head and tail pairs are even on all ranks, and only keys move."""
    loads = loads_of([930_000, *[8_000] * 14, 6_576], 8)
    assert loads.max() < 1.03


@given(st.integers(1, 10**15), st.integers(1, 10**13))
def test_a_document_has_no_more_stripes_than_servers_will_work_on_it(work, share):
    assert 1 <= num_stripes(work, share) <= max(1, work // share + 1)
    assert num_stripes(work, share) <= num_stripes(2 * work, share)
