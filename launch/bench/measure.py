"""`distca measure kernels`: how long does a back end take for tasks of any shape on this device?

Calls are timed as servers make them: many equal tasks in one call, so that every part of the device has work, over a
grid of rows and keys. The planner reads this table (`planner.cost`). Two numbers say the same in short: what a tile of
query rows costs, and what each block of keys adds; short tasks over few keys pay for tiles, long ones for blocks, and
FLOPs would not tell them apart. Beside them, in the same process: whole documents, a call as planned, and PyTorch's
own operators on the same rows.
"""

from __future__ import annotations

import inspect
import logging
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
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from distca.cost import AttentionShape
from distca.errors import SettingsError
from distca.hardware import HardwareTable, Speed, TileFit
from distca.kernels.attention import attend, attend_backward
from distca.kernels.capability import refusal
from distca.kernels.delta import delta_of
from distca.kernels.worklist import work_list
from distca.launch.bench.plan import draw_lengths
from distca.masks import UNBOUNDED, Bands, MaskRule
from distca.plan import PlanInputs, make_pool
from distca.planner import plan_step
from distca.routes import routes_of

# Shape suffixes: S query rows, C key rows, H query heads, G key/value heads, D head size.

logger = logging.getLogger(__name__)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TILE = 128
REPEATS = 5  # the median counts
MOST_ROWS = 32768  # of a timed task
ROWS_PER_CALL = {"cuda": 16384, "cpu": 256}  # enough tiles for every part of the device
KEYS_PER_CALL = {"cuda": 1 << 20, "cpu": 1 << 15}  # beyond, tasks read the same keys
SHORT = "512 documents of 8 tokens"
DENSE = {
    "cuda": {"SDPA, cuDNN": SDPBackend.CUDNN_ATTENTION, "SDPA, FlashAttention 2": SDPBackend.FLASH_ATTENTION},
    "cpu": {"SDPA, CPU": SDPBackend.FLASH_ATTENTION},
}


def measure_kernels(
    backend: str,
    device: str,
    heads: tuple[int, int, int],
    dtype: str,
    longest: int,
    seconds: float,
    command: str,
    say: Callable[[str], None] = lambda text: None,
) -> HardwareTable:
    """Time the grid in at most about `seconds`, leaving out its longest keys if need be; then the comparisons. `say`
    hears what is being timed."""
    query_heads, kv_heads, head_dim = heads
    sentence = refusal(backend, head_dim=head_dim, dtype=DTYPES[dtype], softcap=0.0, device_type=device)
    if sentence:
        raise SettingsError(sentence)
    if device == "cuda" and not torch.cuda.is_available():
        raise SettingsError("--device cuda: PyTorch finds no GPU here")
    if longest < 4 * TILE:
        raise SettingsError(f"--longest {longest}: two sizes make a table, give at least {4 * TILE}")
    shape = AttentionShape(query_heads, kv_heads, head_dim, DTYPES[dtype].itemsize)
    clock, until = _Clock(backend, device, shape, DTYPES[dtype]), time.perf_counter() + seconds
    keys = [TILE * 4**n for n in range(12) if TILE * 4**n <= longest]
    rows = [size for size in keys if size <= MOST_ROWS]
    columns, lists, calls, took = [], [], [], 0.0
    for num_keys in keys:
        start = time.perf_counter()
        if len(columns) > 1 and start + 4 * took > until:  # 4 times the keys
            break
        columns.append([])
        for num_rows in rows:
            say(f"timing tiles of {num_rows:,} rows x {num_keys:,} keys")
            bands, copies = _full_tiles(num_rows, num_keys, device)
            calls.append(clock.attend(bands))
            lists.append(bands)
            columns[-1].append([s / copies for s in calls[-1]])
        took = time.perf_counter() - start
    say("timing whole documents, and PyTorch's operators")
    seconds_RK2 = np.array(columns).transpose(1, 0, 2)
    return HardwareTable(
        device=torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU",
        date=datetime.now(timezone.utc).date().isoformat(),
        command=command,
        versions={"python": platform.python_version(), "torch": torch.__version__, "triton": _version("triton")},
        backend=backend,
        query_heads=query_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        dtype=dtype,
        rows=rows,
        keys=keys[: len(columns)],
        forward_s=seconds_RK2[..., 0].tolist(),
        backward_s=seconds_RK2[..., 1].tolist(),
        fit={
            name: fit(lists, [call[i] for call in calls], query_heads) for i, name in enumerate(("forward", "backward"))
        },
        speeds=dict(_comparisons(clock, min(keys[len(columns) - 1], MOST_ROWS))),
    )


def fit(lists: list[Bands], seconds: list[float], query_heads: int) -> TileFit:
    """Least squares of the relative errors; neither cost is negative."""
    work = [work_list(bands, int(bands.q1.max()), query_heads, TILE, TILE) for bands in lists]
    counts = np.array([[len(w.items), w.num_blocks()] for w in work], float) / np.array(seconds)[:, None]
    both = np.linalg.lstsq(counts, np.ones(len(seconds)), rcond=None)[0]
    least = counts.sum(0) / (counts**2).sum(0)  # of each alone
    single = [np.array([least[0], 0.0]), np.array([0.0, least[1]])]
    candidates = [both] if (both >= 0).all() else single
    error, cost = min((float(np.sqrt(np.mean((counts @ c - 1) ** 2))), tuple(c.tolist())) for c in candidates)
    return TileFit(tile_s=cost[0], block_s=cost[1], error=error)


def table_of(found: HardwareTable) -> Table:
    heads = f"{found.query_heads}:{found.kv_heads} heads of {found.head_dim}, {found.dtype}"
    table = Table(title=f"{found.device}, back end {found.backend}, {heads}: forward / backward TFLOP/s of full tiles")
    table.add_column("rows \\ keys", justify="right")
    for keys in found.keys:
        table.add_column(f"{keys:,}", justify="right")
    shape = AttentionShape(found.query_heads, found.kv_heads, found.head_dim, DTYPES[found.dtype].itemsize)
    for rows, forward, backward in zip(found.rows, found.forward_s, found.backward_s, strict=True):
        speeds = [
            f"{shape.flops(rows * keys) / f / 1e12:.3g} / {shape.flops(rows * keys, True) / b / 1e12:.3g}"
            for keys, f, b in zip(found.keys, forward, backward, strict=True)
        ]
        table.add_row(f"{rows:,}", *speeds)
    lines = [
        f"{name}: {cost.tile_s * 1e6:.3g} us a tile + {cost.block_s * 1e6:.3g} us a block, {cost.error:.0%} off"
        for name, cost in found.fit.items()
    ]
    lines += [f"{name}: {speed.forward:.3g} / {speed.backward:.3g} TFLOP/s" for name, speed in found.speeds.items()]
    table.caption = "\n".join(lines)
    return table


class _Clock:
    """Times calls of one back end, and PyTorch's operators, on random rows."""

    def __init__(self, backend: str, device: str, shape: AttentionShape, dtype: torch.dtype):
        self.backend, self.device, self.shape, self._dtype = backend, device, shape, dtype

    def attend(self, bands: Bands) -> tuple[float, float]:
        """Seconds forward and backward of one call with these tasks."""
        s, num_q, num_k = self.shape, int(bands.q1.max()), int(bands.k1.max())
        q_SHD, d_out_SHD = (self.rows(num_q, s.query_heads, s.head_dim) for _ in range(2))
        k_CGD, v_CGD = (self.rows(num_k, s.kv_heads, s.head_dim) for _ in range(2))
        options = dict(scale=s.head_dim**-0.5, backend=self.backend)
        out_SHD, lse_SH = attend(q_SHD, k_CGD, v_CGD, bands, **options)
        saved = (lse_SH, delta_of(out_SHD, d_out_SHD), d_out_SHD)
        return (
            self._seconds(lambda: attend(q_SHD, k_CGD, v_CGD, bands, **options)),
            self._seconds(lambda: attend_backward(q_SHD, k_CGD, v_CGD, *saved, bands, **options)),
        )

    def differentiate(self, forward: Callable, *inputs: torch.Tensor) -> tuple[float, float]:
        """Seconds forward and backward of an operator of PyTorch."""
        inputs = [x.requires_grad_() for x in inputs]
        out = forward(*inputs)
        d_out = torch.randn_like(out)
        backward_s = self._seconds(lambda: torch.autograd.grad(out, inputs, d_out, retain_graph=True))
        return self._seconds(lambda: forward(*inputs)), backward_s

    def speed(self, pairs: int, seconds: tuple[float, float]) -> Speed:
        forward, backward = (self.shape.flops(pairs, i > 0) / s / 1e12 for i, s in enumerate(seconds))
        return Speed(forward=forward, backward=backward)

    def rows(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, device=self.device).to(self._dtype)

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
        if self.device == "cuda":
            torch.cuda.synchronize()


def _comparisons(clock: _Clock, length: int) -> Iterator[tuple[str, Speed]]:
    """One causal document, packed documents and a server's call as planned; then PyTorch on the same, as far as it can
    be had here."""
    one = np.array([length])
    short = np.full(512, 8)
    packed = draw_lengths("heavy-tail", length, max(length, ROWS_PER_CALL[clock.device]), seed=0)
    ours = {
        "a causal document": _causal(one),
        "packed documents": _causal(packed),
        SHORT: _causal(short),
        "a server's call as planned": _planned(packed),
    }
    for name, bands in ours.items():
        yield name, clock.speed(int(bands.area().sum()), clock.attend(bands))
    theirs = {
        f"{name}, {what}": (_dense, lengths, op)
        for name, op in DENSE[clock.device].items()
        for what, lengths in (("a causal document", one), (f"{SHORT} in one call", short))
    }
    if clock.device == "cuda":
        for name, lengths in (("a causal document", one), ("packed documents", packed)):
            theirs |= {
                f"FlashAttention 2 varlen, {name}": (_varlen, lengths),
                f"FlexAttention, {name}": (_flex, lengths),
            }
    for name, (operator, lengths, *options) in theirs.items():
        try:
            yield name, clock.speed(_pairs(lengths), operator(clock, lengths, *options))
        except (RuntimeError, TypeError, ImportError) as error:  # not for this dtype, head size or version of PyTorch
            logger.warning("left out: %s: %s", name, str(error).partition("\n")[0])


def _dense(clock: _Clock, lengths: np.ndarray, operator: SDPBackend) -> tuple[float, float]:
    """Documents of one length, side by side in the operator's batch dimension."""
    s, count, length = clock.shape, len(lengths), int(lengths[0])
    q, k, v = (clock.rows(count, heads, length, s.head_dim) for heads in (s.query_heads, s.kv_heads, s.kv_heads))
    with sdpa_kernel(operator):
        attend = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)  # noqa: E731
        return clock.differentiate(attend, q, k, v)


def _varlen(clock: _Clock, lengths: np.ndarray) -> tuple[float, float]:
    from torch.nn.attention.varlen import varlen_attn  # newer than the oldest PyTorch that the rest works with

    # where the keyword is missing, heads are shared without it
    gqa = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    s, most = clock.shape, int(lengths.max())
    ends = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=clock.device)
    q, k, v = (clock.rows(int(lengths.sum()), heads, s.head_dim) for heads in (s.query_heads, s.kv_heads, s.kv_heads))

    def attend(q, k, v):
        return varlen_attn(q, k, v, ends, ends, most, most, window_size=(-1, 0), **gqa)

    return clock.differentiate(attend, q, k, v)


def _flex(clock: _Clock, lengths: np.ndarray) -> tuple[float, float]:
    s, total = clock.shape, int(lengths.sum())
    document = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)).to(clock.device)

    def sees(_batch, _head, row, key):
        return (row >= key) & (document[row] == document[key])

    mask = torch.compile(create_block_mask)(sees, None, None, total, total, device=clock.device)
    compiled = torch.compile(flex_attention, dynamic=False)
    q, k, v = (clock.rows(1, heads, total, s.head_dim) for heads in (s.query_heads, s.kv_heads, s.kv_heads))
    return clock.differentiate(lambda q, k, v: compiled(q, k, v, block_mask=mask, enable_gqa=True), q, k, v)


def _planned(lengths: np.ndarray) -> Bands:
    """The tasks of one of eight attention servers for as many ranks of documents like these."""
    ranks, lengths = 8, np.tile(lengths, 8)
    lengths = np.append(lengths, -int(lengths.sum()) % ranks)
    inputs = PlanInputs(lengths, (MaskRule(),), ranks, make_pool(ranks, ranks, False), 10_000, TILE)
    return routes_of(plan_step(inputs, MaskRule())).of_server(0).tasks


def _causal(lengths: np.ndarray) -> Bands:
    ends = np.cumsum(lengths)
    first, zeros = ends - lengths, np.zeros_like(ends)
    return Bands(first, ends, first, ends, zeros - UNBOUNDED, zeros)


def _pairs(lengths: np.ndarray) -> int:
    return int(_causal(lengths).area().sum())


def _full_tiles(rows: int, keys: int, device: str) -> tuple[Bands, int]:
    """Copies of a tile whose rows see all its keys, each with keys of its own as far as there is room for keys."""
    copies = max(1, ROWS_PER_CALL[device] // rows)
    n, with_own_keys = np.arange(copies), max(1, KEYS_PER_CALL[device] // keys)
    q0, k0, far = n * rows, n % with_own_keys * keys, np.full_like(n, UNBOUNDED)
    return Bands(q0, q0 + rows, k0, k0 + keys, -far, far), copies


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
