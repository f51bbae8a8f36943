"""Every CUDA path between a model's layers and an attention server keeps to the device and to its streams' order, and
gives what the CPU gives: shown without a GPU.

What `fake_cuda` is, and what it cannot show, is at its top."""

import in_process
import numpy as np
import pytest
import torch
import torch.distributed as dist
from dense import dense_attention, relative_error
from fake_cuda import DeviceError, fake_cuda
from groups_in_process import InProcess
from in_process import attend_distributed, attention_of_ranks, make_exchanges
from two_strands import gradients_of, make_batches, make_module

from distca.masks import MaskRule
from distca.parallel import server as server_module
from distca.parallel.attach import checkpoint_activations, probe
from distca.parallel.core_attention import Exchange
from distca.parallel.link import FORWARD, MAX_IN_FLIGHT, PLAN, REPLY, GroupLink, Header, LinkError, Rows, unpack
from distca.parallel.rows import on_device
from distca.parallel.server import AttentionServer
from distca.parallel.streams import to_host
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


@pytest.mark.parametrize("backend", ["torch", "triton", "flash", "reference"])
@pytest.mark.parametrize("pool", POOLS)
def test_a_call_and_its_gradients_are_those_of_dense_attention(pool, backend, gpu):
    pool, dtype = POOLS[pool], torch.bfloat16 if backend == "flash" else torch.float32
    rows = random_rows(sum(LENGTHS), dtype=dtype)
    inputs = PlanInputs(np.array(LENGTHS), (MaskRule(), MaskRule(50)), 2, pool, 0, 16)
    exchanges, servers = make_exchanges(2, pool, backend, CUDA)
    sites = attention_of_ranks(exchanges, inputs, device=CUDA)
    there = [x.to(CUDA) for x in rows]
    for window in (0, 50):
        gpu.waits.clear()
        found = attend_distributed(sites, *there, MaskRule(window))
        assert not {"synchronize", "reads a value", "copies to the host"} & {*gpu.waits}, "the host waits for kernels"
        for a, b in zip(found, dense(*rows, LENGTHS, window), strict=True):
            assert a.is_cuda and relative_error(a.cpu(), b) < (1e-5 if dtype == torch.float32 else 0.02)
    reports = [s.take_report() for s in servers]
    assert sum(r.calls for r in reports) >= 4 and all(r.busy_s > 0 for r in reports if r.calls)


@pytest.fixture
def store():
    """Where the groups of two ends in one process meet."""
    return dist.HashStore()


def make_links(store, nccl: bool) -> list[GroupLink]:
    """Both ends: headers over a stand-in for Gloo, payloads too or over one for NCCL, which has a group each way."""

    def groups(name: str, device_type: str) -> list[InProcess]:
        return [InProcess(dist.PrefixStore(name, store), end, device_type) for end in (0, 1)]

    headers, ways = groups("headers", "cpu"), [groups(f"way {n}", "cuda") for n in (0, 1)]
    return [
        GroupLink(
            "0-0",
            headers[end],
            1 - end,
            (60.0, None)[end],
            CUDA,
            nccl=(ways[end][end], ways[1 - end][end]) if nccl else None,
        )
        for end in (0, 1)
    ]


@pytest.mark.parametrize("nccl", [False, True], ids=["gloo", "nccl"])
def test_a_link_carries_rows_of_the_device_and_words_of_the_host(nccl, store, gpu):
    """More messages than may be in flight, each computed on the default stream and freed at once."""
    ours, theirs = make_links(store, nccl)
    x, index = torch.arange(5 * 64.0).reshape(5, 64).to(CUDA), torch.tensor([4, 0, 2]).to(CUDA)
    gpu.waits.clear()
    for call in range(2 * MAX_IN_FLIGHT + 1):
        ours.send(Header(FORWARD, call=call), [Rows(x + call, index), x[:1] * 2])
        header, payload = theirs.wait_message()
        assert header.call == call and payload.is_cuda
        found, doubled = unpack(payload, [((3, 64), torch.float32), ((1, 64), torch.float32)])
        found += 1  # by the consumer's stream
        theirs.send(Header(REPLY, call=call), [found, doubled])
        _, payload = ours.wait_message()
        found, _ = unpack(payload, [((3, 64), torch.float32), ((1, 64), torch.float32)])
        assert torch.equal(found.cpu(), x.cpu()[[4, 0, 2]] + call + 1)
    assert "synchronize" not in gpu.waits
    words = torch.arange(7)
    ours.send(Header(PLAN), [words])
    _, payload = theirs.wait_message()
    assert torch.equal(to_host(payload).view(torch.int64)[:7], words)


@pytest.mark.parametrize("nccl", [False, True], ids=["gloo", "nccl"])
def test_calls_over_a_link_are_those_of_dense_attention(nccl, store, gpu):
    """A trainer and a dedicated server, each with its threads, over what they have between processes."""
    pool, rows = make_pool(1, 1, False), random_rows(200)
    inputs = PlanInputs(np.array([150, 50]), (MaskRule(),), 1, pool, 0, 16)
    ours, theirs = make_links(store, nccl)
    server = AttentionServer(0, "torch", CUDA)
    server.serve(0, theirs)
    exchange = Exchange(0, {0: ours})
    sites = attention_of_ranks([exchange], inputs, device=CUDA)
    there = [x.to(CUDA) for x in rows]
    for _ in range(3):
        for a, b in zip(attend_distributed(sites, *there), dense(*rows, [150, 50]), strict=True):
            assert relative_error(a.cpu(), b) < 1e-5
    assert server.take_report().calls == 6 and "synchronize" not in gpu.waits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("pool", ["in place", "dedicated"])
def test_two_strands_of_a_model_have_the_loss_and_gradients_of_the_cpu(pool, dtype, gpu):
    """Layers, attention, checkpointed chunks of the loss; forward and backward."""
    pool = make_pool(1, 0, True) if pool == "in place" else make_pool(1, 1, False)
    module = make_module()
    wanted = gradients_of(module, make_batches([], pool))
    module = module.to(CUDA, dtype)
    found = gradients_of(module, make_batches([], pool, CUDA, "torch"))
    for a, b in zip(found, wanted, strict=True):
        assert a.is_cuda and relative_error(a.cpu(), b) < (1e-5 if dtype == torch.float32 else 0.1)


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_a_model_on_the_device_passes_the_probe(backend, gpu):
    calls = probe(make_module().to(CUDA), backend)
    assert [call.head_dim for call in calls] == [8] * 3


def test_checkpointed_layers_call_attention_once_on_the_device(gpu):
    module, pool = make_module(), make_pool(1, 1, False)
    wanted = gradients_of(module, make_batches([], pool))
    checkpoint_activations(module.model)
    events = []
    found = gradients_of(module.to(CUDA), make_batches(events, pool, CUDA, "triton"))
    assert sum(event.startswith("send a") for event in events) == 3
    for a, b in zip(found, wanted, strict=True):
        assert relative_error(a.cpu(), b) < 1e-5


def test_rows_that_a_plan_leaves_on_the_cpu_end_a_call(gpu, monkeypatch):
    """The harness at work: a device that is forgotten at one place is an error, wherever the call goes through it."""
    monkeypatch.setattr(in_process, "on_device", lambda route, _device: on_device(route, torch.device("cpu")))
    pool, rows = make_pool(1, 1, False), random_rows(40)
    inputs = PlanInputs(np.array([40]), (MaskRule(),), 1, pool, 0, 16)
    sites = attention_of_ranks(make_exchanges(1, pool, "torch", CUDA)[0], inputs, device=CUDA)
    with pytest.raises(DeviceError, match="outside of the device's memory"):
        attend_distributed(sites, *(x.to(CUDA) for x in rows))


def test_answers_that_do_not_wait_for_their_kernels_are_an_error(gpu, monkeypatch):
    monkeypatch.setattr(server_module, "mark", lambda _device: None)
    pool, rows = make_pool(1, 1, False), random_rows(40)
    inputs = PlanInputs(np.array([40]), (MaskRule(),), 1, pool, 0, 16)
    sites = attention_of_ranks(make_exchanges(1, pool, "torch", CUDA)[0], inputs, device=CUDA)
    with pytest.raises(LinkError, match="still written on stream 0"):
        attend_distributed(sites, *(x.to(CUDA) for x in rows))
