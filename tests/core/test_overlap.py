"""Nano-batches are made of whole documents, evenly; overlap is on where it pays."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distca.overlap import SMALLEST_PART, Outlook, decide, halves, num_passes

lengths_lists = st.lists(st.one_of(st.integers(0, 5), st.integers(1, 5000)), max_size=40)


@given(lengths_lists, st.integers(1, 9))
def test_every_document_is_in_one_nano_batch(lengths, num_ranks):
    parts = halves(np.array(lengths, np.int64), num_ranks)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(lengths)))
    assert all((np.diff(part) > 0).all() for part in parts)


@given(lengths_lists, st.integers(1, 9))
def test_two_nano_batches_are_even_and_leave_no_rank_without_rows(lengths, num_ranks):
    lengths = np.array(lengths, np.int64)
    parts = halves(lengths, num_ranks)
    if len(parts) == 2:
        tokens = [int(lengths[part].sum()) for part in parts]
        assert min(tokens) >= num_ranks and min(tokens) * SMALLEST_PART >= sum(tokens)
        assert abs(tokens[0] - tokens[1]) <= lengths.max()


@given(lengths_lists.filter(lambda x: sum(x) > 16 * 2 and max(x) * 2 <= sum(x)))
def test_documents_of_at_most_half_the_tokens_are_divided(lengths):
    assert len(halves(np.array(lengths, np.int64), 1)) == 2


@pytest.mark.parametrize("lengths", [[], [0], [900], [900, 100], [3, 4]])
def test_one_document_of_nearly_all_tokens_is_not_divided(lengths):
    assert len(halves(np.array(lengths, np.int64), 4)) == 1


def test_equal_documents_are_divided_in_the_middle():
    parts = halves(np.full(8, 100), 4)
    assert [len(part) for part in parts] == [4, 4]


@pytest.mark.parametrize(("accumulation", "passes"), [(1, 1), (2, 1), (3, 2), (4, 2)])
def test_micro_batches_go_in_pairs(accumulation, passes):
    assert num_passes(accumulation, True) == passes and num_passes(accumulation, False) == accumulation


SHARED, IN_PLACE, DEDICATED = Outlook(False, 2), Outlook(True, 0), Outlook(True, 2)


@pytest.mark.parametrize(
    ("outlook", "on", "because"),
    [
        (SHARED, False, "share this machine's processors"),
        (DEDICATED, True, "trainers compute while"),
        (IN_PLACE, False, "planner.wire does not say"),
        (Outlook(True, 0, 1.0, 1.0, 0.5), True, "2 s instead of 2.5 s"),
        (Outlook(True, 0, 1.0, 1.0, 0.01), False, "10 ms wire"),
        (Outlook(True, 0, 0.0, 0.0, 0.0), False, "instead of"),
        (Outlook(True, 2, 1.0, 0.8, 0.2), True, "1 s instead of 2 s"),
        (Outlook(True, 2, 1.0, 0.0, 0.0), False, "1 s instead of 1 s"),
    ],
)
def test_auto_goes_by_what_there_is_to_gain(outlook, on, because):
    decision = decide("auto", outlook)
    assert decision.on == on and because in decision.reason


@pytest.mark.parametrize("outlook", [SHARED, IN_PLACE, DEDICATED])
def test_what_is_set_stands(outlook):
    assert decide("on", outlook).on and not decide("off", outlook).on
