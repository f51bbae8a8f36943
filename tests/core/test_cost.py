"""FLOPs and bytes of a plan are those of the operators that run and the rows that travel."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distca.cost import AttentionShape
from distca.kernels.merge import statistics_dtype
from distca.masks import MaskRule
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
    assert shape.wire_bytes(rows, keys) == sent


@pytest.mark.parametrize("trainers_serve", [True, False])
def test_what_stays_at_home_costs_no_bytes(trainers_serve):
    """Balanced documents on serving trainers stay; a dedicated server needs every row."""
    pool = make_pool(2, 0 if trainers_serve else 1, trainers_serve)
    inputs = PlanInputs(np.array([256, 256]), (MaskRule(),), 2, pool, 20_000, 128)
    moved = routes_of(plan_step(inputs, MaskRule())).moved_rows()
    shape = AttentionShape(4, 2, 16, 4)
    assert shape.wire_bytes(*moved) == (0 if trainers_serve else shape.wire_bytes(512, 512))
    assert ALIGNMENT == 16  # per tensor and message: too little to be predicted
