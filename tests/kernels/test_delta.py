"""delta = rowsum(d_out * out), and the stand-in for out that has it."""

import pytest
import torch

from distca.kernels.delta import delta_of, out_with_delta
from distca.kernels.merge import statistics_dtype


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_delta_is_summed_in_the_statistics_dtype(dtype):
    out, d_out = torch.randn(6, 3, 64).to(dtype), torch.randn(6, 3, 64).to(dtype)
    delta = delta_of(out, d_out)
    assert delta.dtype == statistics_dtype(dtype)
    torch.testing.assert_close(delta.double(), (out.double() * d_out.double()).sum(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [1, 8, 128])
def test_the_stand_in_has_delta_to_the_last_bit_of_its_dtype(head_dim, dtype):
    """No cancellation: an error of half a unit in each product is one of half a unit in their sum."""
    out, d_out = (torch.randn(500, 2, head_dim, dtype=torch.float64).to(dtype) for _ in range(2))
    delta = delta_of(out, d_out)
    found = delta_of(out_with_delta(d_out, delta), d_out)
    unit = torch.finfo(dtype).eps + 4 * torch.finfo(delta.dtype).eps * head_dim**0.5
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps * d_out.double().abs().sum(-1)
    assert ((found - delta).abs() <= unit / 2 * delta.abs() + tiny).all()


@pytest.mark.parametrize("size", [0.0, 1e-36, 1e-25, 1e-12, 1.0, 1e25], ids=str)
def test_gradients_whose_squares_leave_the_range_keep_their_delta(size):
    out, d_out = torch.randn(40, 2, 64), torch.randn(40, 2, 64) * size
    d_out[::2] = torch.randn(20, 2, 64)  # beside ordinary ones
    delta = delta_of(out, d_out)
    found = delta_of(out_with_delta(d_out, delta), d_out)
    torch.testing.assert_close(found, delta, rtol=1e-5, atol=1e-44)
