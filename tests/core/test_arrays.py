"""Columns of integers are sorted and spread like the plain way does it."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from distca.arrays import order_by, ranges, spread


@given(st.integers(0, 40), st.lists(st.sampled_from([1, 3, 2**20, 2**40, 2**62]), min_size=1, max_size=4), st.data())
def test_order_by_is_the_stable_order_however_wide_the_columns(count, sizes, data):
    columns = [
        np.array(data.draw(st.lists(st.integers(0, n), min_size=count, max_size=count)), np.int64) for n in sizes
    ]
    assert order_by(*columns).tolist() == np.lexsort(columns[::-1]).tolist()


@given(st.one_of(st.lists(st.integers(0, 4)), st.lists(st.just(1))))
def test_spread_and_ranges_number_every_repeat(counts):
    index, nth = spread(np.array(counts, np.int64))
    expected = [(i, j) for i, count in enumerate(counts) for j in range(count)]
    assert list(zip(index.tolist(), nth.tolist(), strict=True)) == expected
    starts = 10 * np.arange(len(counts))
    assert ranges(starts, np.array(counts, np.int64)).tolist() == [10 * i + j for i, j in expected]
