"""What comes to a device and leaves it does not wait for kernels, and is complete when it is handed on."""

import numpy as np
import pytest
import torch

from distca.masks import MaskRule
from distca.parallel.rows import on_device
from distca.parallel.streams import keep, mark, running_on, side_stream, to_device, to_host
from distca.plan import PlanInputs, make_pool
from distca.planner import plan_step
from distca.routes import routes_of

CPU = torch.device("cpu")
on_a_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="would show that copies pass kernels by on a GPU, and bring the right values"
)


def make_routes():
    inputs = PlanInputs(np.array([100, 60]), (MaskRule(),), 2, make_pool(2, 2, True), 0, 16)
    routes = routes_of(plan_step(inputs, MaskRule()))
    return [routes.of_trainer(0), routes.of_server(2)]


def assert_same(ours, theirs):
    for name in ("q_rows", "kv_rows", "alone", "shared", "into"):
        if hasattr(theirs, name):
            assert np.array_equal(getattr(ours, name).cpu().numpy(), getattr(theirs, name)), name


@pytest.mark.parametrize("route", make_routes(), ids=lambda route: type(route).__name__)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, on_a_gpu])])
def test_a_routes_rows_go_to_the_device_as_they_are(device, route):
    moved = on_device(route, torch.device(device))
    assert_same(moved, route)
    assert len(moved.links) == len(route.links) > 1
    for ours, theirs in zip(moved.links, route.links, strict=True):
        assert_same(ours, theirs)
        assert ours.q_rows.device.type == device


def test_on_a_cpu_nothing_is_copied_and_nobody_waits():
    x = torch.arange(5)
    assert to_host(x) is x and to_device(x, CPU) is x
    assert side_stream(CPU) is None and mark(CPU) is None
    with running_on(None, None):
        keep(None, [x])


@pytest.mark.gpu
@on_a_gpu
def test_copies_pass_by_the_kernels_of_the_default_stream():
    device = torch.device("cuda")
    x, side = torch.arange(1 << 20), side_stream(device)
    there = to_device(x, device)
    torch.cuda._sleep(1 << 31)
    busy = mark(device)
    again = to_device(x + 1, device)
    with running_on(side):
        back = to_host(there)
    assert not busy.query(), "the copies waited for a kernel that has nothing to do with them"
    assert torch.equal(back, x) and torch.equal(to_host(again), x + 1) and busy.query()
