"""`distca measure kernels`: how long does a back end take for tasks of any shape on this device?

Calls are timed as servers make them: many equal tasks in one call, so that every part of the device has work, over a
grid of rows and keys. Two numbers then predict any call (`TileCost`): what a tile of query rows costs, and what each
block of keys adds. Short tasks over few keys pay for tiles, long ones for blocks; FLOPs would not tell them apart.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import torch
import torch.nn.functional as F
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel

from distca.config import KernelTimes, TileCost, TimedTasks
from distca.cost import AttentionShape
from distca.errors import SettingsError
from distca.kernels.attention import attend, attend_backward
from distca.kernels.capability import refusal
from distca.kernels.merge import delta_of
from distca.kernels.worklist import work_list
from distca.launch.plan import draw_lengths
from distca.masks import UNBOUNDED, Bands

# Shape suffixes: S query rows, C key rows, H query heads, G key/value heads, D head size.

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TILE = 128
REPEATS = 5  # the median counts
ROWS_PER_CALL = {"cuda": 16384, "cpu": 256}  # enough tiles for every part of the device
KEYS_PER_CALL = {"cuda": 1 << 20, "cpu": 1 << 15}  # beyond, tasks read the same keys
DENSE = {
    "cuda": {"SDPA, cuDNN": SDPBackend.CUDNN_ATTENTION, "SDPA, FlashAttention 2": SDPBackend.FLASH_ATTENTION},
    "cpu": {"SDPA, CPU": SDPBackend.FLASH_ATTENTION},
}


def measure_kernels(
    backend: str, device: str, heads: tuple[int, int, int], dtype: str, longest: int, seconds: float, command: str
) -> KernelTimes:
    """Time the grid, packed documents and PyTorch's operators, in at most about `seconds`."""
    query_heads, kv_heads, head_dim = heads
    sentence = refusal(backend, head_dim=head_dim, dtype=DTYPES[dtype], softcap=0.0, device_type=device)
    if sentence:
        raise SettingsError(sentence)
    if device == "cuda" and not torch.cuda.is_available():
        raise SettingsError("--device cuda: PyTorch finds no GPU here")
    if longest < TILE:
        raise SettingsError(f"--longest {longest}: a tile has {TILE} rows, give at least that")
    shape = AttentionShape(query_heads, kv_heads, head_dim, DTYPES[dtype].itemsize)
    clock = _Clock(backend, device, shape, DTYPES[dtype])
    until, tasks, lists = time.perf_counter() + seconds, [], []
    for rows, keys in _grid(longest):
        if time.perf_counter() > until and len(tasks) > 2:
            break
        bands, copies = _equal_tasks(rows, keys, device)
        tasks.append(clock.timed(bands, rows, keys, copies))
        lists.append(bands)
    lengths = draw_lengths("heavy-tail", longest, max(longest, ROWS_PER_CALL[device]), seed=0)
    ends = np.cumsum(lengths)
    packed = Bands(ends - lengths, ends, ends - lengths, ends, np.full_like(ends, -UNBOUNDED), np.zeros_like(ends))
    documents = clock.timed(packed, int(lengths.max()), int(lengths.max()), len(lengths))
    square = max(point.keys for point in tasks if point.rows == point.keys)
    return KernelTimes(
        device=torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU",
        date=datetime.now(timezone.utc).date().isoformat(),
        command=command,
        versions={"python": platform.python_version(), "torch": torch.__version__, "triton": _version("triton")},
        backend=backend,
        query_heads=query_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        dtype=dtype,
        forward=fit(lists, [point.forward_s for point in tasks], query_heads),
        backward=fit(lists, [point.backward_s for point in tasks], query_heads),
        tasks=tuple(tasks),
        documents=documents,
        dense={name: clock.dense(square, operator) for name, operator in DENSE[device].items()},
    )


def fit(lists: list[Bands], seconds: list[float], query_heads: int) -> TileCost:
    """Least squares of the relative errors; neither cost is negative."""
    work = [work_list(bands, int(bands.q1.max()), query_heads, TILE, TILE) for bands in lists]
    counts = np.array([[len(w.items), w.num_blocks()] for w in work], float) / np.array(seconds)[:, None]
    both = np.linalg.lstsq(counts, np.ones(len(seconds)), rcond=None)[0]
    single = [np.array([1 / counts[:, 0].mean(), 0.0]), np.array([0.0, 1 / counts[:, 1].mean()])]
    candidates = [both] if (both >= 0).all() else single
    error, cost = min((float(np.sqrt(np.mean((counts @ c - 1) ** 2))), tuple(c.tolist())) for c in candidates)
    return TileCost(tile_s=cost[0], block_s=cost[1], error=error)


def table_of(times: KernelTimes) -> Table:
    heads = f"{times.query_heads}:{times.kv_heads} heads of {times.head_dim}, {times.dtype}"
    table = Table(title=f"{times.device}, back end {times.backend}, {heads}")
    for heading in ("rows", "keys", "tasks", "forward ms", "TFLOP/s", "backward ms", "TFLOP/s"):
        table.add_column(heading, justify="right")
    for p in (*times.tasks, times.documents):
        speeds = [f"{x:.3g}" for x in (p.forward_s * 1e3, p.forward_tflops, p.backward_s * 1e3, p.backward_tflops)]
        table.add_row(f"{p.rows:,}", f"{p.keys:,}", f"{p.copies:,}", *speeds)
    lines = ["the last row: packed documents of a heavy-tailed batch, its longest one's length"]
    lines += [f"{name}: forward {f:.3g}, backward {b:.3g} TFLOP/s dense" for name, (f, b) in times.dense.items()]
    for name, cost in ("forward", times.forward), ("backward", times.backward):
        lines.append(
            f"{name}: {cost.tile_s * 1e6:.3g} us a tile + {cost.block_s * 1e6:.3g} us a block, {cost.error:.0%} off"
        )
    table.caption = "\n".join(lines)
    return table


class _Clock:
    """Times calls of one back end on random rows."""

    def __init__(self, backend: str, device: str, shape: AttentionShape, dtype: torch.dtype):
        self._backend, self._device, self._shape, self._dtype = backend, device, shape, dtype

    def timed(self, bands: Bands, rows: int, keys: int, copies: int) -> TimedTasks:
        s, num_q, num_k = self._shape, int(bands.q1.max()), int(bands.k1.max())
        q_SHD, d_out_SHD = (self._random(num_q, s.query_heads, s.head_dim) for _ in range(2))
        k_CGD, v_CGD = (self._random(num_k, s.kv_heads, s.head_dim) for _ in range(2))
        options = dict(scale=s.head_dim**-0.5, backend=self._backend)
        out_SHD, lse_SH = attend(q_SHD, k_CGD, v_CGD, bands, **options)
        saved = (lse_SH, delta_of(out_SHD, d_out_SHD), d_out_SHD)
        forward_s = self._seconds(lambda: attend(q_SHD, k_CGD, v_CGD, bands, **options))
        backward_s = self._seconds(lambda: attend_backward(q_SHD, k_CGD, v_CGD, *saved, bands, **options))
        pairs = int(bands.area().sum())
        return TimedTasks(
            rows=rows,
            keys=keys,
            copies=copies,
            forward_s=forward_s,
            backward_s=backward_s,
            forward_tflops=s.flops(pairs) / forward_s / 1e12,
            backward_tflops=s.flops(pairs, backward=True) / backward_s / 1e12,
        )

    def dense(self, length: int, operator: SDPBackend) -> tuple[float, float]:
        """TFLOP/s of PyTorch's operator on one causal document, forward and backward."""
        s = self._shape
        q, k, v = (self._random(1, h, length, s.head_dim) for h in (s.query_heads, s.kv_heads, s.kv_heads))
        inputs = [x.requires_grad_() for x in (q, k, v)]
        forward = lambda: F.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)  # noqa: E731
        with sdpa_kernel(operator):
            forward_s = self._seconds(forward)
            out = forward()
            backward_s = self._seconds(lambda: torch.autograd.grad(out, inputs, q, retain_graph=True))
        pairs = length * (length + 1) // 2
        return s.flops(pairs) / forward_s / 1e12, s.flops(pairs, backward=True) / backward_s / 1e12

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, device=self._device).to(self._dtype)

    def _seconds(self, call: Callable) -> float:
        call()  # compiles, and fills caches
        found = []
        for _ in range(REPEATS):
            self._wait()
            start = time.perf_counter()
            call()
            self._wait()
            found.append(time.perf_counter() - start)
        return statistics.median(found)

    def _wait(self) -> None:
        if self._device == "cuda":
            torch.cuda.synchronize()


def _grid(longest: int) -> Iterator[tuple[int, int]]:
    """(rows, keys) in octaves of 4, few pairs first: what time does not allow comes last."""
    sizes = [TILE * 4**n for n in range(12) if TILE * 4**n <= longest]
    points = [(rows, keys) for rows in sizes for keys in sizes if rows <= keys]
    return iter(sorted(points, key=lambda p: (p[0] * p[1], p)))


def _equal_tasks(rows: int, keys: int, device: str) -> tuple[Bands, int]:
    """Copies of a causal document's last `rows` rows, each with keys of its own as far as there is room for keys."""
    copies = max(1, ROWS_PER_CALL[device] // rows)
    n, with_own_keys = np.arange(copies), max(1, KEYS_PER_CALL[device] // keys)
    q0, k0 = n * rows, n % with_own_keys * keys
    return Bands(q0, q0 + rows, k0, k0 + keys, np.full_like(n, -UNBOUNDED), np.full_like(n, keys - rows)), copies


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
