"""Every back end computes exactly the core attention of its task list, forward and backward.

The truth is dense autograd attention in fp64 over the painted mask. A new back end is tested by its name in `BACKENDS`.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from masks_painted import count
from nan_memory import nan_memory
from problems import ALL, CASES, HEADS, NONE, Problem, causal, joined, pieces_of
from varlen_emulated import varlen_on_cpu

from distca.kernels import torch_blocks
from distca.kernels.attention import BACKENDS
from distca.kernels.capability import refusal
from distca.kernels.delta import delta_of
from distca.kernels.merge import merge
from distca.masks import Bands, cut

EXACT = {"rtol": 1e-10, "atol": 1e-11}
ON_CPU = [
    name for name in BACKENDS if not refusal(name, head_dim=8, dtype=torch.float64, softcap=0.0, device_type="cpu")
]  # the back end "triton" computes nothing in float64: see test_triton.py
ON_CPU += ["flash"]  # its operators are emulated here


def assert_close(found: list[torch.Tensor], expected: list[torch.Tensor], **bounds) -> None:
    for name, x, y in zip(("out", "lse", "dq", "dk", "dv"), found, expected, strict=True):
        torch.testing.assert_close(x, y, **bounds or EXACT, msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture(autouse=True, scope="module")
def flash_on_cpu():
    with varlen_on_cpu():
        yield


@pytest.fixture(autouse=True)
def one_thread():
    """At these sizes threads would mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("name", CASES)
def test_forward_and_gradients_equal_dense_attention(name, backend):
    problem = Problem.of(*CASES[name])
    with nan_memory():
        found = problem.run(backend)
    assert_close(found, problem.dense())


@pytest.mark.parametrize("backend", ON_CPU)
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


@pytest.mark.parametrize("backend", ON_CPU)
@settings(max_examples=40, deadline=None)
@given(tasks=task_lists(), heads=st.sampled_from(HEADS))
def test_any_task_list_equals_dense_attention(backend, tasks, heads):
    problem = Problem.of(tasks, 13, 17, heads, head_dim=4)
    assert_close(problem.run(backend), problem.dense())


@st.composite
def packed_documents(draw) -> Problem:
    """Short documents, equal and unequal, long ones, cut ones and windows, with rows between that no task touches."""
    tasks, row, key = [], 0, 0
    for _ in range(draw(st.integers(1, 4))):
        length, count = draw(st.sampled_from([1, 3, 8, 16, 63, 64, 65, 90])), draw(st.sampled_from([1, 2, 9]))
        window = draw(st.sampled_from([NONE, NONE, -4]))
        gap, before = draw(st.sampled_from([0, 0, 5])), draw(st.sampled_from([0, 0, 7]))
        for _ in range(count):
            tasks.append((row, row + length, key, key + before + length, window + before, before))
            row, key = row + length + gap, key + before + length + gap
    if draw(st.booleans()):  # rows with keys in two tasks
        tasks += [(row, row + 10, key, key + 6, NONE, ALL), (row, row + 10, key + 6, key + 16, NONE, 0)]
        row, key = row + 10, key + 16
    order = draw(st.permutations(range(len(tasks))))
    return Problem.of(Bands.of(*(tasks[i] for i in order)), row, key, draw(st.sampled_from(HEADS)), head_dim=4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@settings(max_examples=40, deadline=None)
@given(problem=packed_documents())
def test_packed_documents_equal_the_reference(dtype, problem):
    problem = problem.to(dtype)
    with nan_memory():
        found = problem.run("torch")
    expected = problem.run("reference")
    if dtype == torch.float64:
        return assert_close(found, expected)
    for x, y in zip(found, expected, strict=True):
        x, y = (t.double().masked_fill(t == -torch.inf, 0.0) for t in (x, y))  # -inf: lse of a row that sees nothing
        assert (x - y).norm() <= 0.05 * y.norm() + 0.01 * problem.d_out.double().norm()  # rounded before it cancels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [1, 5, 8, 40, 64])
def test_a_short_document_has_the_same_bits_whatever_lies_beside_it(length, dtype):
    crowd = [8, 8, 3, 64, length, length, 90] + [length] * 9
    problem = Problem.of(causal(*crowd), sum(crowd), sum(crowd), (8, 2), 16).to(dtype)
    together = problem.run("torch")
    for nth in (4, 12):
        at = slice(sum(crowd[:nth]), sum(crowd[:nth]) + length)
        rows = (x[at].contiguous() for x in (problem.q, problem.k, problem.v, problem.d_out))
        alone = Problem(causal(length), *rows, problem.scale).run("torch")
        assert all(torch.equal(x[at], y) for x, y in zip(together, alone, strict=True))


def test_short_documents_share_a_few_operator_calls():
    for lengths, calls in (([8] * 512, 1), ([8] * 500 + [300] + [8] * 500, 3), (list(range(3, 61)) * 5, 8)):
        work = torch_blocks.batches_of(causal(*lengths), sum(lengths), sum(lengths), batched=True)
        assert len(work.batches) == calls and work.all_rows and work.all_keys


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


CUT_CASES = ["short documents", "a document of 698 rows", "sliding windows of 5 and 64", "large inverse causal"]


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("name", CUT_CASES)
def test_cutting_query_rows_changes_nothing(name, backend):
    problem = Problem.of(*CASES[name])
    recut = joined(pieces_of(problem.tasks, [1, 100, 128, 299], "q"))
    assert_close(problem.run(backend, recut), problem.run(backend), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("backend", ON_CPU)
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


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_call_gives_the_same_bits(dtype, backend):
    problem = Problem.of(joined([causal(300, 129), Bands.of((0, 300, 300, 429, NONE, ALL))]), 429, 429, (8, 2)).to(
        dtype
    )
    torch.set_num_threads(2)
    first = problem.run(backend)
    for _ in range(3):
        assert all(torch.equal(x, y) for x, y in zip(problem.run(backend), first, strict=True))


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("name", ["short documents", "a large shard at an offset", "sinks and a window"])
def test_float32_is_within_1e_5_of_float64(name, backend):
    problem = Problem.of(*CASES[name], (8, 2), 32)
    found, expected = problem.to(torch.float32).run(backend), problem.dense()
    for x, y in zip(found, expected, strict=True):
        assert (x - y).nan_to_num(0.0, 0.0, 0.0).norm() <= 1e-5 * y.nan_to_num(0.0, 0.0, 0.0).norm()


@pytest.mark.parametrize("backend", ON_CPU)
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


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("size", [1e-25, 1e-8, 1e12])
def test_gradients_of_any_size_keep_their_precision(size, backend):
    """Squares of 1e-25 are zero in float32; the back end "torch" divides by the length of d_out."""
    problem = Problem.of(causal(40), 40, 40).to(torch.float32)
    expected = problem.run(backend)[2:]
    problem.d_out = problem.d_out * size
    for x, y in zip(problem.run(backend)[2:], expected, strict=True):
        torch.testing.assert_close(x / size, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ON_CPU)
def test_a_row_without_gradient_gives_none(backend):
    problem = Problem.of(causal(20), 20, 20)
    problem.d_out[5:9] = 0.0
    found = problem.run(backend)
    assert not found[2][5:9].any()
    assert_close(found, problem.dense())


@pytest.mark.parametrize("backend", ON_CPU)
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
@pytest.mark.parametrize("backend", sorted({*BACKENDS} - {"flash"}))  # half precision: see test_flash.py
@pytest.mark.parametrize("name", CASES)
def test_a_gpu_computes_the_same_within_float32(name, backend):
    problem = Problem.of(*CASES[name], (8, 2), 32)
    on_gpu = problem.to(torch.float32, "cuda")
    found, again = on_gpu.run(backend), on_gpu.run(backend)
    assert all(torch.equal(x, y) for x, y in zip(found, again, strict=True))
    assert_close([x.cpu().double() for x in found], problem.dense(), rtol=1e-3, atol=1e-3)
