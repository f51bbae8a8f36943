"""Every CUDA path between a model's layers and an attention server keeps to the device and to its streams' order, and
gives what the CPU gives: shown without a GPU.

What `fake_cuda` is, and what it cannot show, is at its top."""

import numpy as np
import pytest
import torch
from dense import dense_attention, relative_error
from fake_cuda import fake_cuda
from in_process import attend_distributed, attention_of_ranks, make_exchanges

from distca.masks import MaskRule
from distca.plan import PlanInputs, make_pool

CUDA = torch.device("cuda")
POOLS = {
    "in place": make_pool(2, 0, True),
    "dedicated": make_pool(2, 2, False),
    "mixed": make_pool(2, 1, True, 50),
}
LENGTHS = [1, 7, 127, 129, 133, 3]


@pytest.fixture
def gpu():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with fake_cuda() as gpu:
        yield gpu
    torch.set_num_threads(before)


def random_rows(tokens, heads=4, kv_heads=2, head_dim=8, dtype=torch.float32):
    g = torch.Generator().manual_seed(tokens)
    shapes = [(tokens, h, head_dim) for h in (heads, kv_heads, kv_heads, heads)]
    return [torch.randn(shape, generator=g).to(dtype) for shape in shapes]


def dense(q, k, v, d_out, lengths, window=0):
    rows = [x.detach().double().requires_grad_() for x in (q, k, v)]
    out = dense_attention(*rows, lengths, window)
    out.backward(d_out.double())
    return [out.detach(), *(x.grad for x in rows)]


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
@pytest.mark.parametrize("pool", POOLS)
def test_a_call_and_its_gradients_are_those_of_dense_attention(pool, backend, gpu):
    pool = POOLS[pool]
    rows = random_rows(400)
    inputs = PlanInputs(np.array(LENGTHS), (MaskRule(), MaskRule(50)), 2, pool, 0, 16)
    exchanges, servers = make_exchanges(2, pool, backend, CUDA)
    sites = attention_of_ranks(exchanges, inputs, device=CUDA)
    there = [x.to(CUDA) for x in rows]
    for window in (0, 50):
        found = attend_distributed(sites, *there, MaskRule(window))
        for a, b in zip(found, dense(*rows, LENGTHS, window), strict=True):
            assert a.is_cuda and relative_error(a.cpu(), b) < 1e-5
    reports = [s.take_report() for s in servers]
    assert sum(r.calls for r in reports) >= 4 and all(r.busy_s > 0 for r in reports if r.calls)
    assert "synchronize" not in gpu.waits
