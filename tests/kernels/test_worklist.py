"""A work list names every pair of its tasks once, in an order that no cut changes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from masks_painted import count
from problems import ALL, NONE, causal

from distca.kernels.worklist import WorkList, work_list
from distca.masks import Bands, cut, transpose

ROWS, KEYS = 21, 26


@st.composite
def task_lists(draw) -> Bands:
    def band():
        q0, q1 = sorted(draw(st.tuples(st.integers(0, ROWS), st.integers(0, ROWS))))
        k0, k1 = sorted(draw(st.tuples(st.integers(0, KEYS), st.integers(0, KEYS))))
        diagonal = st.one_of(st.sampled_from([NONE, ALL]), st.integers(-25, 28))
        return q0, q1, k0, k1, draw(diagonal), draw(diagonal)

    return Bands.of(*(band() for _ in range(draw(st.integers(0, 5)))))


def walk(work: WorkList, tile: int, block: int):
    """What a kernel does: (group, row, key) for every pair it sees, in its order."""
    for row, group, entry, num_blocks in work.items.tolist():
        for n in range(num_blocks):
            entry += n == work.entries[entry, 1]
            shift, end, row0, row1, key0, key1, lo, hi = work.entries[entry].tolist()
            assert n < end
            for q in range(max(row, row0), min(row + tile, row1)):
                for k in range((n + shift) * block, (n + shift + 1) * block):
                    if max(q + lo, key0) <= k <= min(q + hi, key1 - 1):
                        yield group, q, k


@settings(max_examples=150, deadline=None)
@given(tasks=task_lists(), tile=st.sampled_from([4, 8]), block=st.sampled_from([2, 8, 16]), groups=st.integers(1, 3))
def test_every_pair_of_every_task_is_met_once_by_every_head(tasks, tile, block, groups):
    found = np.zeros((groups, ROWS, KEYS), np.int64)
    for group, q, k in walk(work_list(tasks, ROWS, groups, tile, block), tile, block):
        found[group, q, k] += 1
    assert (found == count(tasks, ROWS, KEYS)).all()


@settings(max_examples=100, deadline=None)
@given(tasks=task_lists(), groups=st.integers(1, 3))
def test_every_tile_has_one_item_per_head_and_most_work_comes_first(tasks, groups):
    work = work_list(tasks, ROWS, groups, 8, 4)
    assert sorted(map(tuple, work.items[:, :2].tolist())) == [(row, g) for row in (0, 8, 16) for g in range(groups)]
    blocks = work.items[:, 3]
    assert (blocks[1:] <= 1.2 * blocks[:-1]).all(), "items are only out of order among those of nearly equal size"


@settings(max_examples=150, deadline=None)
@given(
    tasks=task_lists(),
    key_cuts=st.lists(st.integers(0, KEYS), max_size=3),
    at=st.lists(st.integers(0, ROWS), max_size=3),
    random=st.randoms(use_true_random=False),
)
def test_a_row_meets_its_keys_in_the_same_blocks_and_order_however_the_rows_are_cut(tasks, key_cuts, at, random):
    """One band, its keys cut anywhere, so that bands share diagonals and blocks; listed in any order."""
    band, edges = tasks[:1], [0, *sorted(key_cuts), KEYS]
    tasks = Bands.of(*(r for a, b in zip(edges, edges[1:], strict=False) for r in cut(band, 0, ROWS, a, b).rows()))
    edges = [0, *sorted(at), ROWS]
    pieces = [row for a, b in zip(edges, edges[1:], strict=False) for row in cut(tasks, a, b, 0, KEYS).rows()]
    recut = Bands.of(*random.sample(pieces, len(pieces)))

    def seen(tasks: Bands) -> dict[int, list[int]]:
        keys = {q: [] for q in range(ROWS)}
        for _, q, k in walk(work_list(tasks, ROWS, 1, 8, 4), 8, 4):
            keys[q].append(k)
        return keys

    assert seen(recut) == seen(tasks)


@settings(max_examples=100, deadline=None)
@given(tasks=task_lists())
def test_transposed_tasks_hold_the_same_pairs(tasks):
    assert np.array_equal(count(transpose(tasks), KEYS, ROWS), count(tasks, ROWS, KEYS).T)


def test_no_more_blocks_than_the_mask_needs():
    """Causal documents at multiples of a tile: n (n + 1) / 2 blocks for n tiles, and no document meets another."""
    tasks = causal(1024, 512)
    assert work_list(tasks, 1536, 1, 128, 128).num_blocks() == 36 + 10
    window = Bands.of((0, 1024, 0, 1024, 1 - 128, 0))
    assert work_list(window, 1024, 2, 128, 128).num_blocks() == 2 * 15


def test_short_documents_share_the_items_of_their_tile():
    """2,000 documents of 8 rows: an item per tile of 128 rows and key head, a block per document."""
    work = work_list(causal(*[8] * 2000), 16000, 2, 128, 128)
    assert len(work.items) == 2 * 125 and len(work.entries) == 2000
    assert work.num_blocks() == 2 * 2000


def test_neighbours_in_the_list_read_the_same_keys():
    """Two equal documents, two key heads: a head of a document is done before the next, as far as sizes are alike."""
    items = work_list(causal(2048, 2048), 4096, 2, 128, 128).items
    largest = items[items[:, 3] > 14]
    document_and_head = [(row >= 2048, group) for row, group, *_ in largest.tolist()]
    assert document_and_head == sorted(document_and_head)


@pytest.mark.parametrize("rows, keys", [(1 << 31, 5), (5, 1 << 31)])
def test_more_than_an_int32_counts_is_an_error_of_ours(rows, keys):
    with pytest.raises(AssertionError, match="int32"):
        work_list(Bands.of((rows - 1, rows, keys - 1, keys, NONE, ALL)), rows, 1, 1 << 20, 1 << 20)
