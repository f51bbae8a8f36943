"""Partial results of a row fold into what one pass over all its keys gives."""

import pytest
import torch

from distca.kernels.merge import delta_of, merge, statistics_dtype

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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_delta_is_summed_in_the_statistics_dtype(dtype):
    out, d_out = torch.randn(6, 3, 64).to(dtype), torch.randn(6, 3, 64).to(dtype)
    delta = delta_of(out, d_out)
    assert delta.dtype == statistics_dtype(dtype)
    torch.testing.assert_close(delta.double(), (out.double() * d_out.double()).sum(-1), rtol=1e-5, atol=1e-5)
