"""Order and packing, by their promises."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distca.order import CYCLE, Cursor, DocumentOrder, Pieces, next_pieces, permuted

corpora = st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=30), min_size=1, max_size=4)


def order_over(lengths, seed=0, rates=None):
    return DocumentOrder(seed, [len(source) for source in lengths], rates or [1] * len(lengths))


def columns(pieces: Pieces) -> list[tuple[int, ...]]:
    names = ("source", "epoch", "row", "start", "end")
    return list(zip(*(getattr(pieces, name).tolist() for name in names), strict=True))


def take(lengths, num_micro_batches, tokens, max_document_tokens, cursor=Cursor(), seed=0):  # noqa: B008 - frozen
    lengths = [np.array(source, np.int64) for source in lengths]
    order = order_over(lengths, seed)
    taken = []
    for _ in range(num_micro_batches):
        pieces, cursor = next_pieces(order, lengths, cursor, tokens, max_document_tokens)
        taken.append(pieces)
    return taken, cursor


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 16, 17, 1000, 65537])
@pytest.mark.parametrize("key", [0, 1, 2**64 - 1])
def test_permuted_is_a_permutation(n, key):
    assert np.array_equal(np.sort(permuted(np.arange(n), n, key)), np.arange(n))


@given(st.integers(1, 2**40), st.integers(0, 2**64 - 1), st.data())
def test_permuted_stays_inside_and_takes_arrays_or_numbers(n, key, data):
    index = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=9))
    together = permuted(np.array(index), np.full(len(index), n), np.full(len(index), key, np.uint64))
    assert together.dtype == np.int64 and (0 <= together).all() and (together < n).all()
    assert [int(permuted(i, n, key)) for i in index] == together.tolist()


def test_permuted_never_changes():
    """A change here would give every stored cursor another meaning."""
    assert permuted(np.arange(10), 10, 1).tolist() == [8, 3, 1, 9, 0, 6, 5, 4, 2, 7]
    assert permuted([0, 1, 10**6], 10**9 + 7, 12345).tolist() == [709473205, 104214701, 296035397]


def test_the_order_never_changes():
    order = DocumentOrder(7, [5, 3], [2, 1])
    assert [column.tolist() for column in order.at(np.arange(12))] == [
        [0, 1, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1],
        [1, 1, 2, 4, 2, 0, 3, 0, 2, 4, 1, 1],
    ]


def test_other_keys_give_other_permutations_without_likeness():
    several = np.stack([permuted(np.arange(1000), 1000, key) for key in range(20)])
    same = (several[:, None] == several[None]).mean(axis=2)
    assert same[~np.eye(20, dtype=bool)].max() < 0.01  # 0.001 expected
    neighbours = (np.abs(np.diff(several, axis=1)) == 1).mean()
    assert neighbours < 0.01  # 0.002 expected
    assert np.abs(several.mean(axis=0) - 499.5).max() < 4.5 * 289 / 20**0.5  # no entry prefers a place


@given(corpora, st.integers(0, 2**70))
def test_each_document_comes_once_per_epoch(lengths, seed):
    order = order_over(lengths, seed)
    source, epoch, row = order.at(np.arange(3 * sum(map(len, lengths)) * len(lengths)))
    for s, documents in enumerate(lengths):
        for e in range(int(epoch[source == s].max(initial=-1))):  # the last epoch may be incomplete
            assert sorted(row[(source == s) & (epoch == e)]) == list(range(len(documents)))


def test_epochs_seeds_and_sources_have_orders_of_their_own():
    source, epoch, row = DocumentOrder(0, [500, 500], [1, 1]).at(np.arange(2000))
    orders = [row[(source == s) & (epoch == e)] for s in (0, 1) for e in (0, 1)]
    orders.append(DocumentOrder(1, [500], [1]).at(np.arange(500))[2])
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert (one == other).mean() < 0.05


@given(st.lists(st.fractions(min_value=Fraction(1, 500), max_value=3), min_size=1, max_size=6))
def test_rates_are_met_in_a_cycle_and_spread_over_it(rates):
    source = DocumentOrder(0, [10] * len(rates), rates).at(np.arange(CYCLE))[0]
    for s, rate in enumerate(rates):
        share = float(rate / sum(rates))
        assert abs(np.count_nonzero(source == s) / CYCLE - share) <= 1 / CYCLE
        # at every moment a source has had its share, to within one document per source
        behind = np.cumsum(source == s) - share * np.arange(1, CYCLE + 1)
        assert np.abs(behind).max() <= len(rates) + 1


def test_a_rare_source_still_has_its_turn():
    source = DocumentOrder(0, [1, 1, 1], [1e9, 1, 1e-9]).at(np.arange(CYCLE))[0]
    assert np.bincount(source).tolist() == [CYCLE - 2, 1, 1]


def test_any_part_of_the_order_can_be_asked_for_alone():
    order = DocumentOrder(3, [100, 7], [5, 1])
    whole = order.at(np.arange(10**6, 10**6 + 50))
    for i in (0, 17, 49):
        assert [int(column[0]) for column in order.at([10**6 + i])] == [int(column[i]) for column in whole]


@given(corpora, st.integers(1, 200), st.integers(1, 50), st.integers(0, 3))
def test_micro_batches_hold_exactly_their_tokens_and_continue_each_other(lengths, tokens, longest, seed):
    batches, _ = take(lengths, 5, tokens, longest, seed=seed)
    order = order_over(lengths, seed)
    entries = list(zip(*(column.tolist() for column in order.at(np.arange(5 * tokens))), strict=True))
    document, offset = 0, 0  # where the next token must come from
    for pieces in batches:
        assert pieces.lengths.sum() == tokens
        assert pieces.lengths.min() >= 1 and pieces.lengths.max() <= longest
        for s, e, row, start, end in columns(pieces):
            assert (s, e, row) == entries[document] and start == offset
            offset = end
            if offset == lengths[s][row]:
                document, offset = document + 1, 0


@given(corpora, st.integers(1, 100), st.integers(1, 100), st.integers(0, 6))
def test_resuming_from_a_cursor_equals_going_on(lengths, tokens, longest, done):
    whole, last = take(lengths, 7, tokens, longest)
    _, cursor = take(lengths, done, tokens, longest)
    rest, end = take(lengths, 7 - done, tokens, longest, cursor)
    assert [columns(p) for p in whole[done:]] == [columns(p) for p in rest]
    assert end == last


def test_documents_are_cut_at_the_maximum_and_at_the_end_of_a_micro_batch():
    (first, second), cursor = take([[25]], 2, tokens=16, max_document_tokens=10)
    assert columns(first) == [(0, 0, 0, 0, 10), (0, 0, 0, 10, 16)]
    assert columns(second) == [(0, 0, 0, 16, 25), (0, 1, 0, 0, 7)]
    assert cursor == Cursor(1, 7)


def test_a_document_far_longer_than_a_micro_batch_passes_through_many():
    batches, cursor = take([[1000]], 10, tokens=100, max_document_tokens=100)
    assert [columns(p) for p in batches] == [[(0, 0, 0, 100 * i, 100 * i + 100)] for i in range(10)]
    assert cursor == Cursor(1, 0)


def test_a_cursor_that_is_no_place_in_the_order_is_refused():
    with pytest.raises(AssertionError, match="beyond"):
        take([[5]], 1, 4, 4, Cursor(0, 5))
