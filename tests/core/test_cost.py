"""FLOPs and bytes of a plan are those of the operators that run and the rows that travel."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distca.cost import AttentionShape, PairCost, RowBlockCost, TableCost, cost_from_words, model_flops
from distca.kernels.merge import statistics_dtype
from distca.masks import UNBOUNDED, Bands, MaskRule
from distca.parallel.link import ALIGNMENT, BACKWARD, DTYPE_CODES, FORWARD, Header
from distca.parallel.server import reply_shapes, request_shapes
from distca.plan import PlanInputs, make_pool
from distca.planner import plan_step
from distca.routes import routes_of

counts = st.integers(0, 10**9)


def test_flops_are_two_matrix_products_forward_and_five_backward():
    """A product of (1, D) with (D, 1) is D multiplications and D additions."""
    shape = AttentionShape(query_heads=6, kv_heads=2, head_dim=64, element_bytes=2)
    assert shape.flops(1) == 2 * (2 * 64) * 6
    assert shape.flops(1, backward=True) == 5 * (2 * 64) * 6
    assert shape.flops(0) == shape.flops(0, backward=True) == 0


def test_a_models_step_takes_three_times_its_forward_pass():
    """6 FLOPs per weight and token, 12 per pair and element of a query head: recomputing counts nothing."""
    attention = AttentionShape(query_heads=6, kv_heads=2, head_dim=64, element_bytes=2).flops(1000)
    assert model_flops(10**6, 5000, attention) == 6 * 10**6 * 5000 + 12 * 1000 * 6 * 64


@given(counts, counts)
def test_flops_add_up_over_tasks(a, b):
    shape = AttentionShape(32, 8, 128, 2)
    for backward in (False, True):
        assert shape.flops(a, backward) + shape.flops(b, backward) == shape.flops(a + b, backward)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("rows", "keys"), [(1, 0), (0, 1), (128, 640), (7, 129)])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(8, 2, 8), (7, 7, 16), (4, 1, 72)])
def test_predicted_bytes_are_those_of_the_messages(heads, kv_heads, head_dim, rows, keys, dtype):
    """Requests and replies, forward and backward, without headers and alignment."""
    shape = AttentionShape(heads, kv_heads, head_dim, dtype.itemsize, statistics_dtype(dtype).itemsize)
    sent = 0
    for kind in (FORWARD, BACKWARD):
        header = Header(kind, query_heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype=DTYPE_CODES[dtype])
        for size, row_dtype in request_shapes(header, rows, keys) + reply_shapes(header, rows, keys):
            sent += int(np.prod(size)) * row_dtype.itemsize
    assert sum(shape.wire_bytes(rows, keys, backward) for backward in (False, True)) == sent


@pytest.mark.parametrize("trainers_serve", [True, False])
def test_what_stays_at_home_costs_no_bytes(trainers_serve):
    """Balanced documents on serving trainers stay; a dedicated server needs every row."""
    pool = make_pool(2, 0 if trainers_serve else 1, trainers_serve)
    inputs = PlanInputs(np.array([256, 256]), (MaskRule(),), 2, pool, 20_000, 128)
    moved = routes_of(plan_step(inputs, MaskRule())).moved_rows()
    shape = AttentionShape(4, 2, 16, 4)
    assert shape.wire_bytes(*moved) == (0 if trainers_serve else shape.wire_bytes(512, 512))
    assert ALIGNMENT == 16  # per tensor and message: too little to be predicted


TABLE = TableCost((128, 256, 1024), (64, 512, 4096), ((10, 20, 100), (15, 40, 190), (60, 150, 800)))


def tile(rows, keys):
    return Bands.of((5, 5 + rows, 3, 3 + keys, -UNBOUNDED, UNBOUNDED))


def test_row_blocks_are_paid_whole():
    cost = RowBlockCost(block=128, overhead=164)
    assert cost.of(tile(128, 1000)).tolist() == [128 * (1000 + 164)]
    assert cost.of(tile(1, 1000)).tolist() == cost.of(tile(128, 1000)).tolist()
    assert cost.of(tile(129, 1000)).tolist() == [256 * (1000 + 164)]


def test_a_table_gives_its_own_times_and_lines_between_and_beyond():
    for i, rows in enumerate(TABLE.rows):
        for j, keys in enumerate(TABLE.keys):
            assert TABLE.of(tile(rows, keys)).tolist() == [TABLE.picoseconds[i][j]]
    assert TABLE.of(tile(128, 288)).tolist() == [15]
    assert TABLE.of(tile(640, 512)).tolist() == [95]
    assert TABLE.of(tile(1, 1)).tolist() == [10], "fewer than the table's first cost as much"
    assert TABLE.of(tile(1024, 8192 - 512)).tolist() == [800 + 650], "the last two go on in a line"
    assert TABLE.of(tile(10**7, 10**7))[0] > 0, "no overflow"


@pytest.mark.parametrize("cost", [PairCost(), RowBlockCost(64, 7), TABLE], ids=lambda c: type(c).__name__)
def test_costs_cross_a_wire_and_cost_nothing_for_nothing(cost):
    assert cost_from_words(cost.to_words()) == cost
    nothing = Bands.of((4, 4, 9, 9, -UNBOUNDED, 0), (0, 128, 0, 128, 0, -1))
    assert cost.of(nothing).tolist() == [0, 0]


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 500))
def test_more_keys_never_cost_less(rows, keys, more):
    for cost, rounding in ((PairCost(), 0), (RowBlockCost(), 0), (TABLE, 2)):
        assert cost.of(tile(rows, keys)) <= cost.of(tile(rows, keys + more)) + rounding


@pytest.mark.parametrize(
    ("rows", "keys", "times"),
    [((1,), (1, 2), ((1, 2),)), ((2, 1), (1, 2), ((1, 2), (3, 4))), ((1, 2), (1, 2), ((1, 0), (3, 4)))],
)
def test_a_table_that_is_none_is_refused(rows, keys, times):
    with pytest.raises(AssertionError):
        TableCost(rows, keys, times)
