"""Other methods of context parallelism equal dense attention too: outputs and every gradient, over real processes."""

import numpy as np
import pytest
import torch
from dense import dense_attention, relative_error
from ranks import Ranks

from distca.masks import MaskRule
from distca.parallel import baselines
from distca.parallel.baselines import BASELINES, AllGatherAttention, LocalAttention, UlyssesAttention

HEAD_DIM = 8
LENGTHS = {
    "one document": [240],
    "a document of a token, and few rows": [1, 1, 2, 8],
    "odd": [1, 97, 129, 3, 7, 63, 60],
    "fewer rows than ranks": [3, 1],
}


@pytest.fixture(scope="module")
def ranks():
    with Ranks(4, ["distca.parallel.baselines", "torch._dynamo"]) as ranks:
        yield ranks


def random_rows(tokens, heads, kv_heads, dtype=torch.float64):
    g = torch.Generator().manual_seed(3)
    shapes = [(tokens, h, HEAD_DIM) for h in (heads, kv_heads, kv_heads, heads)]
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes]


def attend_own_rows(rank, ranks, name, lengths, rows, window, shortest=8):
    """One rank's rows of out, dq, dk, dv, and where they lie in the documents: in a process of its own."""
    baselines.SHORTEST_CUT = shortest
    lengths = np.array(lengths)
    own = BASELINES[name].layout(lengths, ranks).of_rank(rank)
    begin = np.cumsum(lengths) - lengths
    where = [np.arange(b + s, b + e) for b, s, e in zip(begin[own.document], own.start, own.end, strict=True)]
    where = torch.from_numpy(np.concatenate([np.empty(0, np.int64), *where]))
    q, k, v = (x[where].requires_grad_() for x in rows[:3])
    attention = BASELINES[name](rank, ranks, lengths, "torch")
    out = attention(q, k, v, MaskRule(window), HEAD_DIM**-0.5)
    out.backward(rows[3][where])
    return where, out.detach(), q.grad, k.grad, v.grad


def whole(parts):
    """Every rank's rows in the documents' order."""
    where = torch.cat([part[0] for part in parts])
    assert where.sort().values.tolist() == list(range(len(where)))
    return [torch.cat(tensors)[where.argsort()] for tensors in zip(*(part[1:] for part in parts), strict=True)]


def dense(rows, lengths, window=0):
    q, k, v = (x.clone().requires_grad_() for x in rows[:3])
    out = dense_attention(q, k, v, lengths, window)
    out.backward(rows[3])
    return out.detach(), q.grad, k.grad, v.grad


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_equals_dense_attention(ranks, name, num_ranks, lengths):
    heads, kv_heads = (6, 3) if num_ranks == 3 else (8, 2)
    lengths = lengths if sum(lengths) % num_ranks == 0 else [*lengths, -sum(lengths) % num_ranks]
    rows = random_rows(sum(lengths), heads, kv_heads)
    found = whole(ranks.run(num_ranks, attend_own_rows, name, lengths, rows, 0))
    for ours, wanted in zip(found, dense(rows, lengths), strict=True):
        assert relative_error(ours, wanted) < 1e-13


@pytest.mark.parametrize(
    ("name", "num_ranks", "heads", "kv_heads"),
    [("local", 2, 7, 7), ("all-gather", 4, 7, 7), ("all-gather", 3, 7, 1), ("ulysses", 4, 8, 2), ("ulysses", 4, 12, 6)],
)
@pytest.mark.parametrize("window", [1, 5, 50])
def test_windows_and_heads_that_are_shared_unevenly(ranks, name, num_ranks, heads, kv_heads, window):
    lengths = [1, 97, 132, 10]
    rows = random_rows(240, heads, kv_heads)
    found = whole(ranks.run(num_ranks, attend_own_rows, name, lengths, rows, window))
    for ours, wanted in zip(found, dense(rows, lengths, window), strict=True):
        assert relative_error(ours, wanted) < 1e-13


@pytest.mark.parametrize("name", BASELINES)
def test_in_half_precision_no_baseline_is_further_off_than_one_device(ranks, name):
    """bf16 crosses the wire, and sums over ranks are made in float32."""
    lengths, rows = [100, 28, 112], random_rows(240, 8, 2, torch.bfloat16)
    exact = dense([x.double() for x in rows], lengths)
    found = whole(ranks.run(4, attend_own_rows, name, lengths, rows, 0))
    alone = whole(ranks.run(1, attend_own_rows, "local", lengths, rows, 0))
    for ours, one_device, wanted in zip(found, alone, exact, strict=True):
        assert ours.dtype == torch.bfloat16
        assert relative_error(ours, wanted) < 2 * relative_error(one_device, wanted)


def test_short_documents_are_not_gathered(ranks):
    lengths, rows = [100, 28, 112], random_rows(240, 4, 2)
    found = whole(ranks.run(2, attend_own_rows, "all-gather", lengths, rows, 0, 128))
    for ours, wanted in zip(found, dense(rows, lengths), strict=True):
        assert relative_error(ours, wanted) < 1e-13
    assert not len(AllGatherAttention(0, 2, np.array(lengths), "torch").key_rows)


def refusal(method, lengths, ranks, heads=(8, 8)):
    return method.refusal(heads, np.array(lengths), ranks)


def test_what_a_baseline_cannot_do_is_said():
    assert refusal(UlyssesAttention, [30], 3, (9, 8)) == "8 query heads cannot be shared out evenly over 3 trainers"
    assert refusal(LocalAttention, [3000, 1000], 2) == "a document of 3,000 tokens is longer than a rank holds (2,000)"
    sentence = refusal(LocalAttention, [1200, 1200, 1200], 2)
    assert sentence == "whole documents leave a rank with 2,400 tokens, more than it holds (1,800)"


@pytest.mark.parametrize("method", BASELINES.values(), ids=BASELINES)
def test_what_a_baseline_can_do_is_not_refused(method):
    assert refusal(method, [2000, 1500, 500], 2) is None
