"""Core attention to be computed: task lists with awkward edges, random rows for them, and the dense truth."""

from dataclasses import dataclass

import numpy as np
import torch
from masks_painted import count
from nan_memory import nan_memory

from distca.kernels.attention import attend, attend_backward
from distca.kernels.delta import delta_of
from distca.kernels.merge import statistics_dtype
from distca.masks import UNBOUNDED, Bands, cut

ALL, NONE = UNBOUNDED, -UNBOUNDED
NAMES = ("out", "lse", "dq", "dk", "dv")
HEADS = [(1, 1), (4, 1), (7, 1), (7, 7), (8, 2)]


@dataclass
class Problem:
    """Random rows for a task list: S query rows, C key rows."""

    tasks: Bands
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    d_out: torch.Tensor
    scale: float
    softcap: float = 0.0

    @staticmethod
    def of(tasks: Bands, rows: int, keys: int, heads=(2, 1), head_dim: int = 8, softcap: float = 0.0) -> "Problem":
        gen = torch.Generator().manual_seed(rows * 1000 + keys)
        normal = lambda n, h: torch.randn(n, h, head_dim, dtype=torch.float64, generator=gen)  # noqa: E731
        q, k, v, d_out = normal(rows, heads[0]), normal(keys, heads[1]), normal(keys, heads[1]), normal(rows, heads[0])
        return Problem(tasks, q, k, v, d_out, 1.7 * head_dim**-0.5, softcap)

    def to(self, dtype: torch.dtype, device: str = "cpu") -> "Problem":
        rows = (x.to(device, dtype) for x in (self.q, self.k, self.v, self.d_out))
        return Problem(self.tasks, *rows, self.scale, self.softcap)

    def run(self, backend: str, tasks: Bands | None = None) -> list[torch.Tensor]:
        """out, lse, dq, dk, dv with the tasks' own lse and delta as the final ones."""
        out, lse = self.forward(backend, tasks)
        return [out, lse, *self.backward(backend, lse, delta_of(out, self.d_out), tasks)]

    def forward(self, backend: str, tasks: Bands | None = None) -> tuple[torch.Tensor, ...]:
        tasks = self.tasks if tasks is None else tasks
        options = {"scale": self.scale, "softcap": self.softcap, "backend": backend}
        return attend(self.q, self.k, self.v, tasks, **options)

    def backward(self, backend: str, lse, delta, tasks: Bands | None = None) -> tuple[torch.Tensor, ...]:
        tasks = self.tasks if tasks is None else tasks
        options = {"scale": self.scale, "softcap": self.softcap, "backend": backend}
        return attend_backward(self.q, self.k, self.v, lse, delta, self.d_out, tasks, **options)

    def dense(self, stats: torch.dtype | None = None) -> list[torch.Tensor]:
        """The same five by autograd over the whole painted matrix: products in the rows' dtype, softmax in `stats`."""
        stats = stats or statistics_dtype(self.q.dtype)
        q, k, v = (x.detach().clone().requires_grad_() for x in (self.q, self.k, self.v))
        painted = torch.from_numpy(count(self.tasks, len(q), len(k)))
        seen = painted.any(1)
        sharing = q.shape[1] // k.shape[1]
        s = torch.einsum("qhd,khd->hqk", q[seen] * self.scale, k.repeat_interleave(sharing, 1)).to(stats)
        if self.softcap:
            s = self.softcap * (s / self.softcap).tanh()
        s = s + painted[seen].to(stats).log()  # -inf where hidden; a pair that n tasks hold counts n times
        out, lse = torch.zeros_like(q), torch.full(q.shape[:2], -torch.inf, dtype=stats)
        p = s.softmax(-1).to(q.dtype)
        out[seen] = torch.einsum("hqk,khd->qhd", p, v.repeat_interleave(sharing, 1))
        lse[seen] = s.logsumexp(-1).T
        grads = torch.autograd.grad(out, (q, k, v), self.d_out, allow_unused=True, materialize_grads=True)
        return [out.detach(), lse.detach(), *grads]


def run_in_nan_memory(problem: Problem, backend: str) -> list[torch.Tensor]:
    """`problem.run`, where what it forgets to write stays nan."""
    with nan_memory():
        return problem.run(backend)


def finite(x: torch.Tensor) -> torch.Tensor:
    """Infinities, which must be where the truth has them, as 0."""
    assert not x.isnan().any()
    return x.double().nan_to_num(0.0, 0.0, 0.0)


def assert_as_good_as_plain(found: list[torch.Tensor], problem: Problem) -> None:
    truth, plain = problem.to(torch.float64).dense(), problem.dense(problem.q.dtype)
    for name, x, y, z in zip(NAMES, found, plain, truth, strict=True):
        ours, theirs = (finite(x) - finite(z)).norm(), (finite(y) - finite(z)).norm()
        assert ours <= 2 * theirs + 1e-6, f"{name}: error {ours:.3g}, plain attention's {theirs:.3g}"


def causal(*lengths: int) -> Bands:
    """Documents packed one after the other."""
    ends = np.cumsum(lengths).tolist()
    return Bands.of(*((e - n, e, e - n, e, NONE, 0) for e, n in zip(ends, lengths, strict=True)))


# name: (tasks, query rows, key rows)
CASES = {
    "one row": (causal(1), 1, 1),
    "short documents": (causal(1, 7, 127, 129), 264, 264),
    "a document of 698 rows": (causal(698), 698, 698),
    "rows 300 to 428 of a document": (Bands.of((0, 128, 0, 428, NONE, 300)), 128, 428),
    "a large shard at an offset": (Bands.of((0, 600, 0, 700, NONE, 100)), 600, 700),
    "two shards of two documents, out of order": (
        Bands.of((60, 100, 0, 80, NONE, 40), (0, 60, 80, 147, NONE, 7)),
        100,
        147,
    ),
    "sliding windows of 5 and 64": (Bands.of((0, 129, 0, 129, -4, 0), (129, 329, 129, 329, -63, 0)), 329, 329),
    "a large sliding window": (Bands.of((0, 1100, 0, 1200, -300, 100)), 1100, 1200),
    "a window wider than its blocks": (Bands.of((0, 700, 0, 1500, -1, 800)), 700, 1500),
    "inverse causal": (Bands.of((0, 127, 0, 127, 0, ALL)), 127, 127),
    "large inverse causal": (Bands.of((0, 800, 0, 800, 1, ALL)), 800, 800),
    "both diagonals": (Bands.of((0, 65, 0, 90, 3, 20)), 65, 90),
    "full": (Bands.of((0, 33, 0, 70, NONE, ALL)), 33, 70),
    "rows that see nothing above, below and between": (
        Bands.of((5, 40, 0, 20, 4, 9), (50, 60, 20, 30, NONE, -3), (70, 75, 3, 3, NONE, ALL)),
        80,
        40,
    ),
    "a row in two key splits": (Bands.of((0, 70, 0, 33, NONE, ALL), (0, 70, 33, 103, NONE, 0)), 70, 103),
    "a row in three key splits, the last seen by few": (
        Bands.of((0, 64, 0, 50, NONE, ALL), (0, 64, 50, 51, NONE, ALL), (40, 64, 51, 75, NONE, 0)),
        64,
        75,
    ),
    "prefix, then causal": (Bands.of((0, 30, 0, 30, NONE, ALL), (30, 90, 0, 90, NONE, 30)), 90, 90),
    "sinks and a window": (Bands.of((0, 90, 4, 90, -19, -4), (0, 90, 0, 4, NONE, 0)), 90, 90),
    "the same pairs twice": (Bands.of((0, 9, 0, 9, NONE, 0), (0, 9, 0, 9, NONE, 0)), 9, 9),
    "no task": (Bands.of(), 3, 2),
    "no row": (Bands.of((0, 0, 0, 0, NONE, 0)), 0, 0),
}


def pieces_of(tasks: Bands, at: list[int], axis: str) -> list[Bands]:
    """The tasks cut at these rows (axis "q") or keys (axis "k"), one list per piece."""
    edges = [0, *at, UNBOUNDED]
    spans = list(zip(edges, edges[1:], strict=False))
    return [cut(tasks, *s, 0, UNBOUNDED) if axis == "q" else cut(tasks, 0, UNBOUNDED, *s) for s in spans]


def joined(pieces: list[Bands]) -> Bands:
    return Bands.of(*(row for piece in pieces for row in piece.rows()))
