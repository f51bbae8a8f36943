"""Every CUDA path of the kernels keeps to the device, and gets there what the CPU gets: shown without a GPU.

What `fake_cuda` is, and what it cannot show, is at its top."""

import pytest
import torch
from fake_cuda import CudaTensor, DeviceError, Gpu, fake_cuda
from problems import CASES, NAMES, Problem, assert_as_good_as_plain, finite

from distca.kernels.attention import BACKENDS
from distca.kernels.delta import delta_of, out_with_delta
from distca.kernels.merge import add_sinks, merge, sinks_gradient
from distca.kernels.rows import Part, gather, scatter

FEW = [
    "short documents",
    "rows 300 to 428 of a document",
    "a row in three key splits, the last seen by few",
    "both diagonals",
    "rows that see nothing above, below and between",
]


@pytest.fixture
def gpu():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # at these sizes threads would mostly wait for each other
    with fake_cuda() as gpu:
        yield gpu
    torch.set_num_threads(before)


def test_a_tensor_of_the_cpu_among_those_of_the_device_is_an_error(gpu):
    there, here = torch.ones(3, 2, device="cuda"), torch.ones(3, 2)
    index = torch.tensor([0, 2])
    for mix in (
        lambda: there + here,
        lambda: torch.cat([there, here]),
        lambda: here.index_add_(0, torch.arange(3), there),
        lambda: there.index_select(0, index),
        lambda: there[index],
        lambda: torch.einsum("ab,ab->a", here, there),
        lambda: torch.index_select(there, 0, index.to("cuda"), out=here[:2]),
        lambda: torch.nn.functional.linear(there, here),
    ):
        with pytest.raises(DeviceError, match="of the CPU among"):
            mix()
    with pytest.raises(DeviceError, match="copy it with .cpu"):
        there.numpy()
    assert there.device == torch.device("cuda", 0) and (there + 1.0).is_cuda and not there.cpu().is_cuda


def test_views_share_memory_and_gradients_cross_devices(gpu):
    whole = torch.zeros(4, 6, device="cuda")
    whole[1:3, ::2] = 1.0
    whole.view(-1)[torch.tensor([0], device="cuda")] = 5.0
    assert whole.cpu().sum() == 6 + 5 and whole.view(torch.int32).is_cuda
    x = torch.randn(3, requires_grad=True)
    (x.to("cuda", torch.bfloat16) * 2).sum().backward()
    assert torch.equal(x.grad, torch.full((3,), 2.0)) and not isinstance(x.grad, CudaTensor)


def test_streams_that_nothing_orders_may_not_share_memory(gpu):
    x, side = torch.ones(5, device="cuda"), torch.cuda.Stream()
    with torch.cuda.stream(side), pytest.raises(DeviceError, match="still written on stream 0"):
        x + 1
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        y = x + 1
    with pytest.raises(DeviceError, match="still used on stream 1"):
        x.zero_()
    event = side.record_event()
    event.synchronize()
    x.zero_()
    assert y.cpu().eq(2).all()


def test_memory_is_not_freed_under_another_streams_launch():
    def freed(says_so: bool) -> None:
        x, side = torch.ones(5, device="cuda"), torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            x + 1
        if says_so:
            x.record_stream(side)

    with fake_cuda():
        freed(True)
    with pytest.raises(DeviceError, match="record_stream is missing"), fake_cuda():
        freed(False)


def test_pinned_buffers_are_read_and_written_when_copies_are_over():
    with fake_cuda() as gpu:
        x, pinned = torch.arange(6.0, device="cuda"), torch.empty(6, pin_memory=True)
        pinned.copy_(x, non_blocking=True)
        assert not torch.equal(pinned, torch.arange(6.0)), "nobody has waited"
        torch.cuda.current_stream().record_event().synchronize()
        assert torch.equal(pinned, torch.arange(6.0)) and not gpu.waits
        with pytest.raises(DeviceError, match="not pinned"):
            torch.empty(6).copy_(x, non_blocking=True)
    with pytest.raises(DeviceError, match="changed before"), fake_cuda():
        pinned = torch.ones(6, pin_memory=True)
        pinned.to("cuda", non_blocking=True)
        pinned.zero_()


def run(problem: Problem, backend: str, gpu: Gpu | None = None) -> list[torch.Tensor]:
    if gpu:
        gpu.waits.clear()
    found = problem.run(backend)
    assert all(x.is_cuda == problem.q.is_cuda for x in found)
    assert not gpu or not gpu.waits, "the host waits for the device in the middle of a call"
    return [x.cpu() for x in found]


@pytest.mark.parametrize("backend", sorted({*BACKENDS} - {"flash"}))
@pytest.mark.parametrize("name", FEW)
def test_back_ends_compute_on_the_device_what_the_reference_does(name, backend, gpu):
    problem = Problem.of(*CASES[name], (8, 2), 16).to(torch.float32)
    for part, x, y in zip(
        NAMES, run(problem.to(torch.float32, "cuda"), backend, gpu), run(problem, "reference"), strict=True
    ):
        torch.testing.assert_close(finite(x), finite(y), rtol=1e-4, atol=1e-5, msg=lambda text, n=part: f"{n}: {text}")
    assert (backend == "triton") == any(name in gpu.launches for name in ("forward", "dq", "dkdv"))


@pytest.mark.parametrize("backend", ["torch", "triton", "flash"])
@pytest.mark.parametrize("name", FEW)
def test_half_precision_errs_at_most_twice_as_much_as_plain_attention(name, backend, gpu):
    problem = Problem.of(*CASES[name], (4, 2), 16).to(torch.bfloat16)
    assert_as_good_as_plain(run(problem.to(torch.bfloat16, "cuda"), backend, gpu), problem)


def test_delta_merge_and_sinks_keep_to_the_device(gpu):
    g = torch.Generator().manual_seed(0)
    out, part, d_out = (torch.randn(33, 4, 8, generator=g) for _ in range(3))
    lse, part_lse = (torch.randn(33, 4, generator=g) for _ in range(2))
    lse[3], part_lse[3], sinks = -torch.inf, -torch.inf, torch.randn(4, generator=g)

    def all_of(out, part, d_out, lse, part_lse, sinks):
        out, lse = add_sinks(*merge(out, lse, part, part_lse), sinks)
        delta = delta_of(out, d_out)
        return out, lse, delta, out_with_delta(d_out, delta), sinks_gradient(lse, delta, sinks)

    arguments = out, part, d_out, lse, part_lse, sinks
    for x, y in zip(all_of(*(x.to("cuda") for x in arguments)), all_of(*arguments), strict=True):
        assert x.is_cuda
        torch.testing.assert_close(x.cpu(), y)
    assert gpu.launches == ["delta"] and "reads a value" not in gpu.waits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_are_moved_in_one_launch_without_waiting(dtype, gpu):
    g = torch.Generator().manual_seed(0)
    here = [torch.randn(40, *shape, generator=g).to(dtype) for shape in ((8, 16), (2, 16), (8,), (2,))]
    index = [torch.randperm(40, generator=g)[:n] for n in (17, 33, 0, 5)]
    parts = [
        Part(x.to("cuda"), i.to("cuda"), x.new_empty(len(i), *x.shape[1:]).to("cuda"))
        for x, i in zip(here, index, strict=True)
    ]
    gpu.waits.clear()
    gather(parts)
    back = [part._replace(x=torch.zeros_like(part.x)) for part in parts]
    scatter(back)
    assert gpu.launches == ["move_rows"] * 2 and not gpu.waits
    for x, i, part, y in zip(here, index, parts, back, strict=True):
        assert torch.equal(part.packed.cpu(), x[i])
        assert torch.equal(y.x.cpu(), torch.zeros_like(x).index_copy_(0, i, x[i]))


def test_rows_that_do_not_fill_words_are_moved_by_operators(gpu):
    x, index = torch.randn(9, 3).bfloat16(), torch.tensor([8, 0])
    there = Part(x.to("cuda"), index.to("cuda"), torch.empty(2, 3, dtype=torch.bfloat16, device="cuda"))
    gather([there])
    scatter([there._replace(x=torch.zeros_like(there.x))])
    assert torch.equal(there.packed.cpu(), x[index]) and not gpu.launches


def test_a_launch_refuses_rows_of_the_cpu(gpu):
    x, index = torch.ones(4, 2, device="cuda"), torch.tensor([1])
    with pytest.raises(DeviceError, match="outside of the device's memory"):
        gather([Part(x, index, torch.empty(1, 2, device="cuda"))])
