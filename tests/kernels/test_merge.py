"""Partial results of a row fold into what one pass over all its keys gives."""

import pytest
import torch

from distca.kernels.attention import attend, attend_backward
from distca.kernels.delta import delta_of
from distca.kernels.merge import add_sinks, merge, sinks_gradient
from distca.masks import UNBOUNDED, Bands

INF = torch.inf


def test_two_halves_of_the_keys_merge_into_the_whole():
    s, v = torch.randn(5, 3, 10, dtype=torch.float64), torch.randn(10, 4, dtype=torch.float64)
    part = lambda keys: (s[..., keys].softmax(-1) @ v[keys], s[..., keys].logsumexp(-1))  # noqa: E731
    out, lse = merge(*part(slice(0, 7)), *part(slice(7, 10)))
    torch.testing.assert_close(out, part(slice(None))[0], rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(lse, part(slice(None))[1], rtol=1e-13, atol=1e-14)


def test_a_row_that_one_side_or_neither_attended_keeps_its_bits_and_is_never_nan():
    value = torch.randn(4, 2)
    out = torch.stack([value[0], torch.zeros(2), torch.zeros(2), value[3]])
    part = torch.stack([torch.zeros(2), value[1], torch.zeros(2), torch.zeros(2)])
    lse, part_lse = torch.tensor([3.3, -INF, -INF, -400.0]), torch.tensor([-INF, -7.1, -INF, -INF])
    merged, total = merge(out, lse, part, part_lse)
    assert torch.equal(merged, out + part)
    assert torch.equal(total, torch.tensor([3.3, -7.1, -INF, -400.0]))


def test_weights_do_not_overflow_whatever_the_size_of_the_scores():
    out, part = torch.ones(2, 1), torch.zeros(2, 1)
    merged, total = merge(out, torch.tensor([1e4, -1e4]), part, torch.tensor([1e4, -1e4]))
    torch.testing.assert_close(merged, torch.full((2, 1), 0.5))
    torch.testing.assert_close(total, torch.tensor([1e4, -1e4]) + torch.tensor(2.0).log())


def test_merge_leaves_its_inputs_alone():
    inputs = torch.randn(3, 2), torch.randn(3), torch.randn(3, 2), torch.randn(3)
    copies = [x.clone() for x in inputs]
    merge(*inputs)
    assert all(torch.equal(x, y) for x, y in zip(inputs, copies, strict=True))


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_sinks_and_their_gradient_equal_attention_with_one_more_key(backend):
    """Row 0 to 8 causal; the sink is a key of score `sinks` and value 0 that servers need not know of."""
    gen = torch.Generator().manual_seed(1)
    normal = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=gen).requires_grad_()  # noqa: E731
    q, k, v, sinks, d_out = normal(9, 4, 8), normal(9, 2, 8), normal(9, 2, 8), normal(4), normal(9, 4, 8).detach()
    s = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(2, 1)) * 0.4
    s = s.masked_fill(~torch.ones(9, 9, dtype=torch.bool).tril(), -INF)
    p = torch.cat([s, sinks[:, None, None].expand(4, 9, 1)], -1).softmax(-1)[..., :-1]
    expected = torch.einsum("hqk,khd->qhd", p, v.repeat_interleave(2, 1))
    gradients = torch.autograd.grad(expected, (q, k, v, sinks), d_out)

    tasks, options = Bands.of((0, 9, 0, 9, -UNBOUNDED, 0)), dict(scale=0.4, backend=backend)
    with torch.no_grad():
        out, lse = add_sinks(*attend(q, k, v, tasks, **options), sinks)
        delta = delta_of(out, d_out)
        found = [*attend_backward(q, k, v, lse, delta, d_out, tasks, **options), sinks_gradient(lse, delta, sinks)]
    for x, y in zip([out, *found], [expected, *gradients], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)
