"""CUDA where there is none: `with fake_cuda():` code that names the device "cuda" runs, on a CPU and with true values.

A tensor on the device is a `CudaTensor`: it says that it is on cuda:0, holds its values in a tensor of the CPU, and
lets each operator see who else takes part. What a GPU would refuse, or silently get wrong, is an error here:

  - a tensor of the CPU among those of the device (numbers, and copies from one to the other, excepted);
  - reading a tensor of the device with NumPy, or asking for an operator that CUDA does not have;
  - a kernel of Triton's that is given an address outside of the device's memory, or rows that are not contiguous;
  - using what another stream may still write, or writing what another may still use, without an event in between;
  - reading a pinned buffer before the copy into it is known to be over, or writing one that is still being read.

Triton's kernels and CUDA's own attention operators are done by plain PyTorch: what is shown is the way to them and
back. That they compute the right thing, only a GPU can show (and Triton's interpreter, see test_triton.py).

To PyTorch's C++ these tensors are on the CPU, which keeps it from entering CUDA's device guards and lets autograd run.
What it makes by itself there, for an operator made of others, is of the CPU: such an operator is emulated, or fails.
"""

from __future__ import annotations

import ctypes
import functools
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
import varlen_emulated
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from distca.kernels import rows, triton_attention, triton_kernels, triton_rows
from distca.kernels.reference import attend_backward_reference, attend_reference
from distca.parallel import core_attention, streams

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
aten = torch.ops.aten


class DeviceError(RuntimeError):
    """A GPU would have refused this, or got it wrong."""


# ---- streams: who has written and read what, and who knows that it is over ----


@dataclass
class Memory:
    """One allocation: the launch that wrote it last and those that have read it since."""

    stream: int
    """Where it was allocated: later launches there get it when it is free."""
    written: tuple[int, int] | None = None  # stream, and its how many-th launch
    read: dict[int, int] = field(default_factory=dict)  # by stream: its last launch
    kept_for: set[int] = field(default_factory=set)
    """Streams that must have come to where they are when it is freed, before it is given away again."""


class Stream:
    """Launches in order; `seen[s]` is up to which launch of stream `s` the next one waits."""

    def __init__(self, device=None, priority: int = 0):
        _check_device(device)
        self.number, self.seen, self.device, self.pending = len(_gpu.streams), {}, CUDA, []
        _gpu.streams.append(self)

    def wait_event(self, event: Event) -> None:
        _join(self.seen, event.seen)

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        self.record_event().synchronize()


class Event:
    """What one stream has been asked for when it was recorded."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False):
        self._timed, self.seen, self._at, self._copies, self._is_over = enable_timing, {}, 0.0, [], True

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or _gpu.current()
        self.seen, self._at, self._copies, self._is_over = (
            dict(stream.seen),
            time.perf_counter(),
            stream.pending[:],
            False,
        )

    def wait(self, stream: Stream | None = None) -> None:
        (stream or _gpu.current()).wait_event(self)

    def synchronize(self) -> None:
        """The host waits: copies into pinned buffers arrive, and whatever is launched later comes later."""
        with _gpu.lock:
            for finish in self._copies:
                finish()
            _join(_gpu.seen_by_host, self.seen)
        self._copies, self._is_over = [], True

    def query(self) -> bool:
        return self._is_over

    def elapsed_time(self, end: Event) -> float:
        if not (self._timed and end._timed and end._is_over):
            raise DeviceError("the time between two events is known when the later one is over and both are timed")
        return (end._at - self._at) * 1e3


class Gpu:
    """What the device remembers."""

    def __init__(self):
        self.lock, self._thread = threading.RLock(), threading.local()
        self.streams: list[Stream] = []
        self.seen_by_host: dict[int, int] = {}
        self.memory: dict[int, tuple[weakref.ref, Memory]] = {}  # by address
        self.pinned: dict[int, weakref.ref] = {}
        self.kept: set = set()
        """Whatever has to live until the device is done."""
        self.errors: list[str] = []
        self.waits: list[str] = []
        """What made the host wait for all that was launched: reading a value, a blocking copy, `synchronize`."""
        self.launches: list[str] = []
        """Triton's kernels by name."""

    def current(self) -> Stream:
        return getattr(self._thread, "stream", self.streams[0])

    @contextmanager
    def stream(self, stream: Stream | None) -> Iterator[None]:
        before = self.current()
        self._thread.stream = stream or before
        try:
            yield
        finally:
            self._thread.stream = before

    def host_waits(self, why: str) -> None:
        self.waits.append(why)
        self.current().synchronize()

    def memory_of(self, host: torch.Tensor) -> Memory:
        storage = host.untyped_storage()
        address = storage.data_ptr()
        with self.lock:
            found = self.memory.get(address)
            if found and found[0]() is storage:
                return found[1]
            memory = Memory(self.current().number)
            if address:
                self.memory[address] = weakref.ref(storage), memory
                weakref.finalize(storage, self._free, address, memory).atexit = False
            return memory

    def holds(self, address: int) -> bool:
        with self.lock:
            storages = [found() for found, _ in self.memory.values()]
        return any(s is not None and s.data_ptr() <= address < s.data_ptr() + s.nbytes() for s in storages)

    def _free(self, address: int, memory: Memory) -> None:
        with self.lock:
            if self.memory.get(address, (None, None))[1] is memory:
                del self.memory[address]
            uses = [*memory.read.items(), *([memory.written] if memory.written else [])]
            known = [self.streams[s] for s in (memory.stream, *memory.kept_for)]
            if not all(any(self.is_over(stream, *use) for stream in known) for use in uses):
                self.errors.append("memory was freed while another stream may still use it: record_stream is missing")

    def is_over(self, stream: Stream, other: int, launch: int) -> bool:
        """Whether a launch is over before the next one of `stream` begins."""
        known = max(stream.seen.get(other, 0), self.seen_by_host.get(other, 0))
        return other == stream.number or launch <= known

    def launch(self, name: str, reads: list[torch.Tensor], writes: list[torch.Tensor]) -> None:
        with self.lock:
            stream = self.current()
            stream.seen[stream.number] = launch = stream.seen.get(stream.number, 0) + 1
            for host in reads:
                memory = self.memory_of(host)
                self._check(name, stream, [memory.written], "is still written")
                memory.read[stream.number] = launch
            for host in writes:
                memory = self.memory_of(host)
                self._check(name, stream, [memory.written, *memory.read.items()], "is still used")
                memory.written, memory.read = (stream.number, launch), {}

    def _check(self, name: str, stream: Stream, uses: list[tuple[int, int] | None], what: str) -> None:
        for use in uses:
            if use and not self.is_over(stream, *use):
                raise DeviceError(f"{name} on stream {stream.number} touches what {what} on stream {use[0]}")


def _join(seen: dict[int, int], other: dict[int, int]) -> None:
    for stream, launch in other.items():
        seen[stream] = max(seen.get(stream, 0), launch)


# ---- tensors ----


class CudaTensor(torch.Tensor):
    """A tensor on the device; `host` has its values, and shares them with the `host` of its views."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, host: torch.Tensor):
        sizes = dict(strides=host.stride(), storage_offset=host.storage_offset(), dtype=host.dtype, device=CPU)
        x = torch.Tensor._make_wrapper_subclass(cls, host.shape, **sizes)
        x.host = host
        _gpu.memory_of(host)
        return x

    def __repr__(self, **_) -> str:
        return f"CudaTensor({self.host})"

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    @property
    def data(self) -> CudaTensor:
        return self.detach()

    @data.setter
    def data(self, other: torch.Tensor) -> None:
        if not isinstance(other, CudaTensor):
            raise DeviceError("a tensor of the device cannot get the values of one of the CPU by .data")
        torch.Tensor.data.__set__(self, other)
        self.host = other.host

    def get_device(self) -> int:
        return 0

    def is_pinned(self) -> bool:
        return False

    def data_ptr(self) -> int:
        return self.host.data_ptr()

    def tolist(self) -> list:
        return self.cpu().tolist()

    def numpy(self, *_args, **_kwargs):
        raise DeviceError("NumPy cannot read a tensor of the device: copy it with .cpu() first")

    __array__ = numpy

    def record_stream(self, stream: Stream) -> None:
        _gpu.memory_of(self.host).kept_for.add(stream.number)

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if operator in OUR_OPERATORS:
            return OUR_OPERATORS[operator](*args, **kwargs)
        if operator is aten.copy_.default:
            return _copy(*args, **kwargs)
        if operator in READ_BY_HOST:
            _gpu.host_waits("reads a value")
        flat, spec = tree_flatten((args, kwargs))
        _check_operator(operator, flat)
        owners = {id(x.host): x for x in flat if isinstance(x, CudaTensor)}
        host_args, host_kwargs = tree_unflatten([_host(x) for x in flat], spec)
        found = EMULATED.get(operator, operator)(*host_args, **host_kwargs)
        wrapped = tree_map_only(torch.Tensor, lambda x: owners[id(x)] if id(x) in owners else CudaTensor(x), found)
        _note_launch(operator, args, kwargs, owners, found)
        return wrapped


READ_BY_HOST = {aten._local_scalar_dense.default, aten.item.default, aten.nonzero.default, aten.equal.default}


def _host(x):
    return x.host if isinstance(x, CudaTensor) else x


def _check_operator(operator, flat: list) -> None:
    for x in flat:
        if isinstance(x, torch.Tensor) and not isinstance(x, CudaTensor) and x.ndim:
            raise DeviceError(f"{operator}: a tensor {tuple(x.shape)} of the CPU among tensors of the device")
    if "_for_cpu" in str(operator):
        raise DeviceError(f"{operator} does not exist on CUDA")


def _note_launch(operator, args, kwargs, owners: dict, found) -> None:
    hosts, written = {number: x.host for number, x in owners.items()}, set()
    for position, argument in enumerate(operator._schema.arguments):
        if argument.alias_info and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            written |= {id(x.host) for x in tree_flatten(value)[0] if isinstance(x, CudaTensor)}
    memories = {x.untyped_storage().data_ptr() for x in hosts.values()}
    results = [x for x in tree_flatten(found)[0] if isinstance(x, torch.Tensor) and id(x) not in hosts]
    fresh = [x for x in results if x.untyped_storage().data_ptr() not in memories]
    if written or fresh or not results:  # else a view, and nothing is launched
        reads = [x for number, x in hosts.items() if number not in written]
        _gpu.launch(str(operator), reads, [x for number, x in hosts.items() if number in written] + fresh)


def _copy(to: torch.Tensor, of: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """`to.copy_(of)`, from anywhere to anywhere."""
    there, here = isinstance(to, CudaTensor), isinstance(of, CudaTensor)
    if there and here:
        _gpu.launch("copy_", [of.host], [to.host])
        to.host.copy_(of.host)
    elif there:
        _gpu.launch("copy_", [], [to.host])
        to.host.copy_(of)
        if non_blocking and _is_pinned(of):
            _gpu.current().pending.append(functools.partial(_refuse_change, of, of.clone()))
        elif of.ndim:
            _gpu.host_waits("copies to the device")
    else:
        _gpu.launch("copy_", [of.host], [])
        if not non_blocking:
            _gpu.host_waits("copies to the host")
            to.copy_(of.host)
        elif _is_pinned(to):
            arrived = of.host.clone()
            to.view(torch.uint8).fill_(0xA5) if to.is_contiguous() and to.ndim else to.zero_()
            _gpu.current().pending.append(functools.partial(to.copy_, arrived))
        else:
            raise DeviceError("a copy into memory that is not pinned, for which nobody waits")
    return to


def _refuse_change(of: torch.Tensor, before: torch.Tensor) -> None:
    if of.numel() and not torch.equal(of.view(torch.uint8), before.view(torch.uint8)):
        _gpu.errors.append("a pinned buffer was changed before the copy out of it was over")


class _Moved(torch.autograd.Function):
    """`x.to(device, dtype)` from one device to another."""

    @staticmethod
    def forward(ctx, x, device, dtype, non_blocking):
        ctx.like = x.device, x.dtype
        if device.type == "cuda":
            moved = CudaTensor(torch.empty_like(x.detach(), dtype=dtype))
            return _copy(moved, x.detach(), non_blocking)
        if non_blocking:
            raise DeviceError("a copy to memory that is not pinned, for which nobody waits")
        return _copy(torch.empty_like(x.host, dtype=dtype), x.detach())

    @staticmethod
    def backward(ctx, d_x):
        return d_x.to(*ctx.like), None, None, None


def _to(x: torch.Tensor, *args, copy: bool = False, **kwargs) -> torch.Tensor:
    if args and isinstance(args[0], torch.Tensor):
        args = (args[0].device, args[0].dtype, *args[1:])
    elif isinstance(kwargs.get("other"), torch.Tensor):
        other = kwargs.pop("other")
        args = (other.device, other.dtype)
    if len(args) == 4 or (len(args) == 3 and isinstance(args[0], torch.dtype)):
        *args, copy = args
    device, dtype, non_blocking, _layout = torch._C._nn._parse_to(*args, **kwargs)
    if device is None or device.type == x.device.type:
        device is None or _check_device(device)
        options = dict(copy=copy) | ({"memory_format": kwargs["memory_format"]} if "memory_format" in kwargs else {})
        return _PLAIN_TO(x, dtype or x.dtype, **options)
    _check_device(device)
    return _Moved.apply(x, device, dtype or x.dtype, non_blocking)


_PLAIN_TO = torch.Tensor.to


def _check_device(device) -> None:
    if device is None or device == -1:
        return
    device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if device.type in ("cuda", "cpu") and device.index not in (None, 0):
        raise DeviceError(f"there is no device {device}")


def _pin(x: torch.Tensor) -> torch.Tensor:
    if _is_pinned(x):
        return x
    pinned = x.clone(memory_format=torch.contiguous_format)
    storage = pinned.untyped_storage()
    _gpu.pinned[storage.data_ptr()] = weakref.ref(storage)
    return pinned


def _is_pinned(x: torch.Tensor) -> bool:
    found = _gpu.pinned.get(x.untyped_storage().data_ptr())
    return found is not None and found() is x.untyped_storage()


FACTORIES = "empty zeros ones full arange tensor as_tensor rand randn randint eye linspace empty_strided".split()


def _factory(plain: Callable) -> Callable:
    @functools.wraps(plain)
    def made(*args, device=None, pin_memory=False, **kwargs):
        if device is None or torch.device(device).type != "cuda":
            x = plain(*args, device=device, **kwargs)
            return _pin(x) if pin_memory else x
        _check_device(device)
        leaf = kwargs.pop("requires_grad", False)
        if args and isinstance(args[0], CudaTensor):  # as_tensor
            return args[0]
        x = CudaTensor(plain(*args, **kwargs))
        if plain.__name__ not in ("empty", "empty_strided"):
            _gpu.launch(plain.__name__, [], [x.host])
        return x.requires_grad_() if leaf else x

    return made


# ---- operators that only CUDA has, and ours ----


def _efficient_forward(
    query, key, value, bias, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, custom_mask_type,
    compute_log_sumexp=False, *, scale=None, seqlen_k=None, window_size=None,
):  # fmt: skip
    """(B, M, H, D), (B, N, H, D) twice -> (B, M, H, D), lse (B, H, M rounded up to 32)."""
    assert compute_log_sumexp and not dropout_p and cu_seqlens_q is cu_seqlens_k is seqlen_k is window_size is None
    s_BHMN, stats = _efficient_scores(query, key, value, bias, custom_mask_type, scale)
    out = torch.einsum("bhmn,bnhd->bmhd", s_BHMN.softmax(-1), value.to(stats)).to(query.dtype)
    rows = query.shape[1]
    lse = query.new_full((query.shape[0], query.shape[2], rows + -rows % 32), torch.nan, dtype=stats)  # padding
    lse[..., :rows] = s_BHMN.logsumexp(-1)
    none = torch.zeros((), dtype=torch.int64)
    return out, lse, none, none.clone(), rows, key.shape[1]


def _efficient_backward(
    grad_out, query, key, value, bias, out, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, logsumexp,
    dropout_p, philox_seed, philox_offset, custom_mask_type, bias_requires_grad, *, scale=None, num_splits_key=None,
    window_size=None, shared_storage_dqdkdv=False,
):  # fmt: skip
    rows = query.shape[1]
    assert not dropout_p and cu_seqlens_q is cu_seqlens_k is window_size is None and num_splits_key == 1
    assert (max_seqlen_q, max_seqlen_k) == (rows, key.shape[1]) and not bias_requires_grad
    assert logsumexp.shape == (query.shape[0], query.shape[2], rows + -rows % 32) and logsumexp.is_contiguous()
    assert (logsumexp[..., rows:] == torch.inf).all(), "rows of the padding would get weight"
    assert grad_out.shape == out.shape == query.shape and grad_out.is_contiguous() and out.is_contiguous()
    s_BHMN, stats = _efficient_scores(query, key, value, bias, custom_mask_type, scale)
    assert logsumexp.dtype == stats and grad_out.dtype == out.dtype == query.dtype
    q, k, v, o, d_o = (x.to(stats) for x in (query, key, value, out, grad_out))
    p_BHMN = (s_BHMN - logsumexp[..., :rows, None]).exp()
    delta_BHM = (o * d_o).sum(-1).transpose(1, 2)
    ds_BHMN = p_BHMN * (torch.einsum("bmhd,bnhd->bhmn", d_o, v) - delta_BHM[..., None]) * scale
    dq, dk = torch.einsum("bhmn,bnhd->bmhd", ds_BHMN, k), torch.einsum("bhmn,bmhd->bnhd", ds_BHMN, q)
    dv = torch.einsum("bhmn,bmhd->bnhd", p_BHMN, d_o)
    return dq.to(query.dtype), dk.to(query.dtype), dv.to(query.dtype), torch.empty(0)


def _efficient_scores(query, key, value, bias, custom_mask_type, scale):
    """s_BHMN in the statistics dtype, -inf where hidden; refuses what the operator refuses."""
    stats = torch.float32
    assert query.dtype == key.dtype == value.dtype and query.dtype != torch.float64, "the operator knows no float64"
    assert query.shape[2] == key.shape[2] == value.shape[2] and key.shape[1] == value.shape[1]
    assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1, "a head's numbers lie side by side"
    assert query.shape[-1] % (4 if query.dtype == torch.float32 else 8) == 0, "lines of 16 bytes"
    s_BHMN = torch.einsum("bmhd,bnhd->bhmn", query.to(stats), key.to(stats)) * scale
    if bias is not None:
        assert bias.shape == s_BHMN.shape and bias.dtype == query.dtype and bias.stride(-1) == 1
        assert bias.stride(-2) * bias.element_size() % 16 == 0 and bias.data_ptr() % 16 == 0, "lines of 16 bytes"
        s_BHMN = s_BHMN + bias.to(stats)
    assert custom_mask_type in (0, 1)
    if custom_mask_type:
        hidden = torch.ones(s_BHMN.shape[-2:], dtype=torch.bool).triu(1)
        s_BHMN = s_BHMN.masked_fill(hidden, -torch.inf)
    return s_BHMN, stats


def _sdpa(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """PyTorch's own attention by plain operators: it would choose one for the CPU, and make its mask there."""
    if not isinstance(query, CudaTensor):
        return _PLAIN_SDPA(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    assert attn_mask is None and not dropout_p
    sharing = query.shape[-3] // key.shape[-3]
    key, value = (x.repeat_interleave(sharing, -3) for x in (key, value))
    s = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        hidden = torch.ones(s.shape[-2:], dtype=torch.bool, device=CUDA).triu(1)
        s = s.masked_fill(hidden, -torch.inf)
    return s.softmax(-1) @ value


_PLAIN_SDPA = torch.nn.functional.scaled_dot_product_attention

EMULATED = {
    aten._efficient_attention_forward.default: _efficient_forward,
    aten._efficient_attention_backward.default: _efficient_backward,
    aten._flash_attention_forward.default: varlen_emulated._forward,
    aten._flash_attention_backward.default: varlen_emulated._backward,
}
OUR_OPERATORS = {
    torch.ops.distca.begin.default: core_attention.begin._init_fn,
    torch.ops.distca.end.default: core_attention.end._init_fn,
}


# ---- Triton's kernels ----


class _Kernel:
    """Stands for a compiled kernel: checks what it would be launched with, then `work` does its work."""

    def __init__(self, name: str, work: Callable = lambda *_args, **_kwargs: None):
        self._name, self._work = name, work

    def __getitem__(self, grid: tuple[int, ...]) -> Callable:
        assert all(0 < programs < 1 << 31 for programs in grid[:1]) and all(0 < n < 1 << 16 for n in grid[1:])
        return functools.partial(self._launch, grid)

    def _launch(self, grid, *args, **kwargs):
        for x in (*args, *kwargs.values()):
            if isinstance(x, torch.Tensor) and not isinstance(x, CudaTensor):
                raise DeviceError(f"kernel {self._name} is given a tensor {tuple(x.shape)} of the CPU")
            if isinstance(x, torch.Tensor) and not x.is_contiguous():
                raise DeviceError(f"kernel {self._name} is given rows with strides {x.stride()}")
        _gpu.launches.append(self._name)
        self._work(*args, **kwargs)


def _delta(out, d_out, delta, _num_rows, **_) -> None:
    delta.copy_((out.float() * d_out.float()).sum(-1))


def _move_rows(table, GATHERS: bool, **_) -> None:
    """As the kernel does it: by addresses."""
    for x, index, packed, num_rows, num_words in table.host.tolist():
        if not num_rows:
            continue
        for address in (x, index, packed):
            if not _gpu.holds(address):
                raise DeviceError("rows are to be moved from or to an address outside of the device's memory")
        rows = _words(index, num_rows, np.int64)
        whole = _words(x, (int(rows.max()) + 1) * num_words, np.int32).reshape(-1, num_words)
        beside = _words(packed, num_rows * num_words, np.int32).reshape(-1, num_words)
        if GATHERS:
            beside[:] = whole[rows]
        else:
            assert len(np.unique(rows)) == num_rows, "a row is there twice: which of them stays?"
            whole[rows] = beside


def _words(address: int, count: int, dtype) -> np.ndarray:
    size = count * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_char * size).from_address(address), dtype)


def _move(parts, gathers: bool) -> None:
    _PLAIN_MOVE(parts, gathers)
    hosts = [(part.x.host, part.index.host, part.packed.host) for part in parts]
    for x, index, packed in hosts:
        _gpu.launch("move_rows", [index, x if gathers else packed], [packed if gathers else x])


_PLAIN_MOVE, _PLAIN_LAUNCH = rows.move_triton, triton_attention._launch


def _attend(kernel, q, k, v, tasks, scale, softcap, **arguments) -> None:
    _PLAIN_LAUNCH(kernel, q, k, v, tasks, scale, softcap, **arguments)
    options = dict(scale=scale, softcap=softcap)
    if kernel == "forward":
        found = dict(zip(("out_ptr", "lse_ptr"), attend_reference(q, k, v, tasks, **options), strict=True))
    else:
        lse, delta_SH = (arguments[name][:, : len(q)].T for name in ("lse2_ptr", "delta_ptr"))
        lse = (lse / triton_attention.LOG2E).contiguous()
        found = attend_backward_reference(q, k, v, lse, delta_SH.contiguous(), arguments["d_out_ptr"], tasks, **options)
        found = dict(zip(("dq_ptr", "dk_ptr", "dv_ptr"), found, strict=True))
    for name, x in found.items():
        if name in arguments:
            arguments[name].copy_(x)


def current_gpu() -> Gpu:
    return _gpu


def _forget() -> None:
    """What is kept of the device from call to call."""
    triton_attention._list_on.cache_clear()
    streams._copies_to.cache_clear()


@contextmanager
def fake_cuda(capability_of_device: tuple[int, int] = (9, 0), flash: bool = True) -> Iterator[Gpu]:
    """Within, there is a device "cuda:0"; what it remembers is yielded. Errors that nobody saw raise at the end."""
    global _gpu
    before, _gpu = _gpu, Gpu()
    default = Stream()

    @contextmanager
    def device(device) -> Iterator[None]:
        _check_device(device)
        yield

    def synchronize(device=None) -> None:
        _gpu.waits.append("synchronize")
        for stream in _gpu.streams:
            stream.synchronize()

    replaced = dict(
        device=device,
        Event=Event,
        Stream=Stream,
        stream=lambda stream: _gpu.stream(stream),
        current_stream=lambda device=None: _gpu.current(),
        default_stream=lambda device=None: default,
        set_stream=lambda stream: setattr(_gpu._thread, "stream", stream),
        set_device=_check_device,
        current_device=lambda: 0,
        synchronize=synchronize,
        get_device_capability=lambda device=None: capability_of_device,
    )
    kernels = {name: _Kernel(name) for name in triton_kernels.KERNELS} | {"delta": _Kernel("delta", _delta)}
    with pytest.MonkeyPatch.context() as patch:
        for name in FACTORIES:
            patch.setattr(torch, name, _factory(getattr(torch, name)))
        for name, thing in replaced.items():
            patch.setattr(torch.cuda, name, thing)
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", _sdpa)
        patch.setattr(torch.Tensor, "to", _to)
        patch.setattr(torch.Tensor, "cpu", lambda x, **_: _to(x, CPU))
        patch.setattr(
            torch.Tensor,
            "cuda",
            lambda x, device=None, non_blocking=False, **_: _to(x, CUDA, non_blocking=non_blocking),
        )
        patch.setattr(torch.Tensor, "pin_memory", _pin)
        patch.setattr(torch.Tensor, "is_pinned", _is_pinned)
        patch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: flash)
        patch.setattr(triton_kernels, "KERNELS", kernels)
        patch.setattr(triton_rows, "move_rows_kernel", _Kernel("move_rows", _move_rows))
        patch.setattr(rows, "move_triton", _move)
        patch.setattr(triton_attention, "_launch", _attend)
        _forget()
        swaps = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)  # a moved parameter stays the same object
        try:
            yield _gpu
            for stream in _gpu.streams:
                stream.synchronize()
            if _gpu.errors:
                raise DeviceError("; ".join(dict.fromkeys(_gpu.errors)))
        finally:
            torch.__future__.set_swap_module_params_on_conversion(swaps)
            _forget()
            _gpu = before


_gpu = Gpu()
