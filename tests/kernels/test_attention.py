"""Every back end computes exactly the core attention of its task list, forward and backward.

The truth is dense autograd attention in fp64 over the painted mask. A new back end is tested by its name in `BACKENDS`.
"""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from masks_painted import count
from nan_memory import nan_memory

from distca.kernels import torch_blocks
from distca.kernels.attention import BACKENDS, attend, attend_backward
from distca.kernels.merge import delta_of, merge, statistics_dtype
from distca.masks import UNBOUNDED, Bands, cut

EXACT = {"rtol": 1e-10, "atol": 1e-11}
ALL, NONE = UNBOUNDED, -UNBOUNDED
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


def assert_close(found: list[torch.Tensor], expected: list[torch.Tensor], **bounds) -> None:
    for name, x, y in zip(("out", "lse", "dq", "dk", "dv"), found, expected, strict=True):
        torch.testing.assert_close(x, y, **bounds or EXACT, msg=lambda text, name=name: f"{name}: {text}")


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


@pytest.fixture(autouse=True)
def one_thread():
    """At these sizes threads would mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_forward_and_gradients_equal_dense_attention(name, backend):
    problem = Problem.of(*CASES[name])
    with nan_memory():
        found = problem.run(backend)
    assert_close(found, problem.dense())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("head_dim", [1, 5, 32])
def test_query_heads_share_key_heads_in_every_ratio(heads, head_dim, backend):
    problem = Problem.of(Bands.of((3, 50, 0, 60, NONE, 13), (50, 70, 10, 60, -9, 0)), 75, 60, heads, head_dim)
    assert_close(problem.run(backend), problem.dense())


@pytest.mark.parametrize(
    "name", ["short documents", "a row in three key splits, the last seen by few", "both diagonals"]
)
def test_the_reference_bends_scores_at_the_softcap(name):
    problem = Problem.of(*CASES[name], softcap=1.5)
    assert_close(problem.run("reference"), problem.dense())


@st.composite
def task_lists(draw) -> Bands:
    def band():
        q0, q1 = sorted(draw(st.tuples(st.integers(0, 13), st.integers(0, 13))))
        k0, k1 = sorted(draw(st.tuples(st.integers(0, 17), st.integers(0, 17))))
        diagonal = st.one_of(st.sampled_from([NONE, ALL]), st.integers(-15, 18))
        return q0, q1, k0, k1, draw(diagonal), draw(diagonal)

    return Bands.of(*(band() for _ in range(draw(st.integers(0, 4)))))


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40, deadline=None)
@given(tasks=task_lists(), heads=st.sampled_from(HEADS))
def test_any_task_list_equals_dense_attention(backend, tasks, heads):
    problem = Problem.of(tasks, 13, 17, heads, head_dim=4)
    assert_close(problem.run(backend), problem.dense())


@settings(max_examples=60, deadline=None)
@given(tasks=task_lists(), edge_rows=st.integers(1, 5))
def test_tiles_hold_each_pair_of_the_tasks_once_and_small_masks_only(tasks, edge_rows):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_blocks, "EDGE_ROWS", edge_rows)
        patch.setattr(torch_blocks, "MASKED_PAIRS", edge_rows**2)
        tiles = list(torch_blocks.tiles(tasks))
    assert np.array_equal(count(Bands.of(*tiles), 13, 17), count(tasks, 13, 17))
    assert all(tile.num_pairs <= edge_rows**2 for tile in tiles if tile.needs_mask)
    for tile in tiles:
        i, j = np.ogrid[: tile.q1 - tile.q0, : tile.k1 - tile.k0]
        sees = (j <= i) if tile.is_causal else np.ones((tile.q1 - tile.q0, tile.k1 - tile.k0), bool)
        cells = count(Bands.of(tile), 13, 17)[tile.q0 : tile.q1, tile.k0 : tile.k1]
        assert tile.needs_mask or np.array_equal(cells, sees)
        assert cells.any(axis=1).all(), "an operator must not meet a row that sees nothing"


@pytest.mark.parametrize(
    "name", ["a large sliding window", "rows that see nothing above, below and between", "one row"]
)
def test_masks_of_tiny_tiles_change_nothing(name, monkeypatch):
    """The same answers when every band is cut into the smallest tiles."""
    tasks, rows, keys = CASES[name]
    problem = Problem.of(cut(tasks, 0, 150, 0, 200), rows, keys)
    monkeypatch.setattr(torch_blocks, "EDGE_ROWS", 16)
    monkeypatch.setattr(torch_blocks, "MASKED_PAIRS", 256)
    assert_close(problem.run("torch"), problem.dense())


def pieces_of(tasks: Bands, at: list[int], axis: str) -> list[Bands]:
    """The tasks cut at these rows (axis "q") or keys (axis "k"), one list per piece."""
    edges = [0, *at, UNBOUNDED]
    spans = list(zip(edges, edges[1:], strict=False))
    return [cut(tasks, *s, 0, UNBOUNDED) if axis == "q" else cut(tasks, 0, UNBOUNDED, *s) for s in spans]


def joined(pieces: list[Bands]) -> Bands:
    return Bands.of(*(row for piece in pieces for row in piece.rows()))


CUT_CASES = ["short documents", "a document of 698 rows", "sliding windows of 5 and 64", "large inverse causal"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CUT_CASES)
def test_cutting_query_rows_changes_nothing(name, backend):
    problem = Problem.of(*CASES[name])
    recut = joined(pieces_of(problem.tasks, [1, 100, 128, 299], "q"))
    assert_close(problem.run(backend, recut), problem.run(backend), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("axis", ["q", "k"])
@pytest.mark.parametrize("name", CUT_CASES)
def test_servers_that_share_the_tasks_add_up_to_one_server(name, axis, backend):
    """Forward parts merge in plan order; backward shares, given the final lse and delta, sum to the gradients."""
    problem = Problem.of(*CASES[name])
    servers = pieces_of(problem.tasks, [60, 200], axis)
    out, lse = torch.zeros_like(problem.q), torch.full(problem.q.shape[:2], -torch.inf, dtype=torch.float64)
    for tasks in servers:
        out, lse = merge(out, lse, *problem.forward(backend, tasks))
    delta = delta_of(out, problem.d_out)
    shares = [problem.backward(backend, lse, delta, tasks) for tasks in servers]
    assert_close([out, lse, *(sum(parts) for parts in zip(*shares, strict=True))], problem.dense())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_call_gives_the_same_bits(dtype, backend):
    problem = Problem.of(joined([causal(300, 129), Bands.of((0, 300, 300, 429, NONE, ALL))]), 429, 429, (8, 2)).to(
        dtype
    )
    torch.set_num_threads(2)
    first = problem.run(backend)
    for _ in range(3):
        assert all(torch.equal(x, y) for x, y in zip(problem.run(backend), first, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["short documents", "a large shard at an offset", "sinks and a window"])
def test_float32_is_within_1e_5_of_float64(name, backend):
    problem = Problem.of(*CASES[name], (8, 2), 32)
    found, expected = problem.to(torch.float32).run(backend), problem.dense()
    for x, y in zip(found, expected, strict=True):
        assert (x - y).nan_to_num(0.0, 0.0, 0.0).norm() <= 1e-5 * y.nan_to_num(0.0, 0.0, 0.0).norm()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "name", ["short documents", "a large shard at an offset", "sinks and a window", "a row in two key splits"]
)
def test_bfloat16_errs_at_most_twice_as_much_as_plain_bfloat16_attention(name, backend):
    problem = Problem.of(*CASES[name], (8, 2), 32).to(torch.bfloat16)
    truth = problem.to(torch.float32).dense()
    plain, found = problem.dense(torch.bfloat16), problem.run(backend)
    error = lambda x, y: (x.float() - y).nan_to_num(0.0, 0.0, 0.0).norm()  # noqa: E731 - inf - inf where nothing is seen
    assert found[1].dtype == torch.float32 and torch.equal(found[1].isinf(), truth[1].isinf())
    for name, x, y, z in zip(("out", "lse", "dq", "dk", "dv"), found, plain, truth, strict=True):
        assert error(x, z) <= 2 * error(y, z), f"{name}: {error(x, z):.3g}, plain {error(y, z):.3g}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [1e-25, 1e-8, 1e12])
def test_gradients_of_any_size_keep_their_precision(size, backend):
    """Squares of 1e-25 are zero in float32; the back end "torch" divides by the length of d_out."""
    problem = Problem.of(causal(40), 40, 40).to(torch.float32)
    expected = problem.run(backend)[2:]
    problem.d_out = problem.d_out * size
    for x, y in zip(problem.run(backend)[2:], expected, strict=True):
        torch.testing.assert_close(x / size, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_without_gradient_gives_none(backend):
    problem = Problem.of(causal(20), 20, 20)
    problem.d_out[5:9] = 0.0
    found = problem.run(backend)
    assert not found[2][5:9].any()
    assert_close(found, problem.dense())


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_no_task_are_never_read(backend):
    """Padding may hold anything: here nan in every row and key that no task touches."""
    tasks = Bands.of((10, 30, 5, 40, NONE, 15), (40, 45, 50, 55, NONE, 0))
    clean, dirty = Problem.of(tasks, 50, 60), Problem.of(tasks, 50, 60)
    for rows in (slice(0, 10), slice(30, 40), slice(45, 50)):
        dirty.q[rows] = dirty.d_out[rows] = torch.nan
    for keys in (slice(0, 5), slice(40, 50), slice(55, 60)):
        dirty.k[keys] = dirty.v[keys] = torch.nan
    out, lse = dirty.forward(backend)
    delta = delta_of(out, clean.d_out)
    assert_close([out, lse, *dirty.backward(backend, lse, delta)], clean.run(backend))


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="would show that each back end is exact on CUDA, and repeats its bits"
)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_a_gpu_computes_the_same_within_float32(name, backend):
    problem = Problem.of(*CASES[name], (8, 2), 32)
    on_gpu = problem.to(torch.float32, "cuda")
    found, again = on_gpu.run(backend), on_gpu.run(backend)
    assert all(torch.equal(x, y) for x, y in zip(found, again, strict=True))
    assert_close([x.cpu().double() for x in found], problem.dense(), rtol=1e-3, atol=1e-3)
