"""The Triton kernels are exact, repeat their bits, and keep them wherever a row is computed: shown without a GPU.

They run in Triton's interpreter, in a process of its own. The truth is dense attention in fp64, as in
test_attention.py; what a GPU's compiler makes of the kernels is in test_aot.py."""

import pytest
import torch
from interpreter import interpreted, run_as_on
from problems import (
    ALL,
    CASES,
    NAMES,
    NONE,
    Problem,
    assert_as_good_as_plain,
    causal,
    finite,
    joined,
    pieces_of,
    run_in_nan_memory,
)

from distca.kernels.delta import delta_of, delta_triton
from distca.kernels.merge import merge
from distca.masks import Bands, cut

LARGE = [name for name in CASES if "large" in name or "wider" in name or "698" in name]
SMALL = [name for name in CASES if name not in LARGE]
MIXED = ["short documents", "rows 300 to 428 of a document", "sinks and a window", "a row in two key splits"]


def assert_exact(found: list[torch.Tensor], problem: Problem, bound: float = 2e-6) -> None:
    expected = problem.to(torch.float64).dense()
    assert torch.equal(found[1].isinf(), expected[1].isinf())
    for name, x, y in zip(NAMES, found, expected, strict=True):
        size = finite(y).norm()
        size = size if size > 1e-9 else finite(problem.d_out).norm()  # one key has no gradient
        assert (finite(x) - finite(y)).norm() <= bound * size, name


@pytest.mark.parametrize("name", [*SMALL, *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE)])
def test_float32_equals_dense_attention(name):
    problem = Problem.of(*CASES[name], (2, 1), 32).to(torch.float32)
    assert_exact(interpreted(run_in_nan_memory, problem, "triton"), problem)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", MIXED)
def test_half_precision_errs_at_most_twice_as_much_as_plain_attention(name, dtype):
    problem = Problem.of(*CASES[name], (2, 1), 32).to(dtype)
    found = interpreted(run_in_nan_memory, problem, "triton")
    assert [x.dtype for x in found] == [dtype, torch.float32, dtype, dtype, dtype]
    assert_as_good_as_plain(found, problem)


UNEVEN = Bands.of((3, 50, 0, 60, NONE, 13), (50, 70, 10, 60, -9, 0)), 75, 60


@pytest.mark.parametrize("heads", [(4, 4), (4, 1), (7, 1), (8, 1), (8, 2)], ids=str)
def test_query_heads_share_key_heads_in_every_ratio(heads):
    problem = Problem.of(*UNEVEN, heads, 16).to(torch.float32)
    assert_exact(interpreted(run_in_nan_memory, problem, "triton"), problem)


@pytest.mark.parametrize("head_dim", [8, 64, 80, 96, 128, 256])
def test_every_head_size(head_dim):
    problem = Problem.of(*UNEVEN, (2, 1), head_dim).to(torch.float32)
    assert_exact(interpreted(run_in_nan_memory, problem, "triton"), problem)


def test_short_documents_share_tiles_at_any_rows():
    problem = Problem.of(causal(8, 8, 8, 3, 60, 1, 50, 17, 8), 163, 163, (2, 1), 16).to(torch.float32)
    assert_exact(interpreted(run_in_nan_memory, problem, "triton"), problem)


@pytest.mark.parametrize("softcap", [1.5, 50.0])
def test_scores_bend_at_the_softcap(softcap):
    problem = Problem.of(*CASES["both diagonals"], (2, 1), 32, softcap).to(torch.float32)
    problem.q *= 4.0  # scores on the bend as well as below it
    assert_exact(interpreted(run_in_nan_memory, problem, "triton"), problem)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("head_dim", [64, 128, pytest.param(256, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("capability", "dtype"), [((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16), ((9, 0), torch.float32)], ids=str
)
def test_the_variants_of_each_gpu_are_exact(capability, dtype, head_dim, softcap):
    """Tile sizes and descriptors; how warps share the work is a compiler's affair, which no interpreter shows."""
    problem = Problem.of(*UNEVEN, (2, 1), head_dim, softcap).to(torch.float32)
    assert_exact(interpreted(run_as_on, capability, dtype, problem), problem)


@pytest.mark.parametrize("name", MIXED)
def test_rows_loaded_by_descriptor_are_hidden_by_the_mask(name):
    problem = Problem.of(*CASES[name], (2, 1), 64).to(torch.float32)
    assert_exact(interpreted(run_as_on, (9, 0), torch.bfloat16, problem), problem)


def test_rows_of_no_task_are_never_read():
    """By address, as on every GPU but Hopper, padding may hold anything: here nan, which no result has."""
    tasks, rows, _keys = UNEVEN
    problem = Problem.of(tasks, rows, 70, (2, 1), 16).to(torch.float32)
    problem.q[:3] = problem.d_out[:3] = problem.q[70:] = problem.d_out[70:] = torch.nan
    problem.k[60:] = problem.v[60:] = torch.nan
    out, lse = interpreted(problem.forward, "triton")
    delta = delta_of(out, problem.d_out.nan_to_num(0.0))
    found = [out, lse, *interpreted(problem.backward, "triton", lse, delta)]
    assert_exact(found, Problem.of(tasks, rows, 70, (2, 1), 16).to(torch.float32))


@pytest.mark.parametrize("axis", ["q", "k"])
def test_servers_that_share_the_tasks_add_up_to_one_server(axis):
    """Forward parts merge in plan order; backward shares, given the final lse and delta, sum to the gradients."""
    problem = Problem.of(*CASES["short documents"], (2, 1), 16).to(torch.float32)
    servers = pieces_of(problem.tasks, [60, 200], axis)
    out, lse = torch.zeros_like(problem.q), torch.full(problem.q.shape[:2], -torch.inf)
    for tasks in servers:
        out, lse = merge(out, lse, *interpreted(problem.forward, "triton", tasks))
    delta = delta_of(out, problem.d_out)
    shares = [interpreted(problem.backward, "triton", lse, delta, tasks) for tasks in servers]
    assert_exact([out, lse, *(sum(parts) for parts in zip(*shares, strict=True))], problem)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_call_gives_the_same_bits(dtype):
    problem = Problem.of(*CASES["sinks and a window"], (2, 1), 16).to(dtype)
    first, again = (interpreted(problem.run, "triton") for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


# masks of a document of 300 rows
DOCUMENTS = {
    "causal": Bands.of((0, 300, 0, 300, NONE, 0)),
    "window": Bands.of((0, 300, 0, 300, -149, 0)),
    "sinks and a window": Bands.of((0, 300, 0, 5, NONE, -70), (0, 300, 5, 300, -69, 0)),
}


def run_elsewhere(problem: Problem, lse: torch.Tensor, delta: torch.Tensor, *rectangle: int) -> list[torch.Tensor]:
    """What a server computes that has only these rows and keys (q0, q1, k0, k1) of the problem, in places that are the
    same modulo 128, zeros elsewhere; brought back to where the problem has them."""
    tasks = cut(problem.tasks, *rectangle)
    tasks = tasks[tasks.area() > 0]
    q0, q1, k0, k1 = (int(x) for x in (tasks.q0.min(), tasks.q1.max(), tasks.k0.min(), tasks.k1.max()))
    dq, dk = 128 - q0 // 128 * 128, 256 - k0 // 128 * 128
    there = Bands(tasks.q0 + dq, tasks.q1 + dq, tasks.k0 + dk, tasks.k1 + dk, tasks.lo, tasks.hi)

    def move(x: torch.Tensor, first: int, last: int, by: int) -> torch.Tensor:
        moved = x.new_zeros(last + by + 60, *x.shape[1:])
        moved[first + by : last + by] = x[first:last]
        return moved

    q, d_out, lse, delta = (move(x, q0, q1, dq) for x in (problem.q, problem.d_out, lse, delta))
    k, v = (move(x, k0, k1, dk) for x in (problem.k, problem.v))
    part = Problem(there, q, k, v, d_out, problem.scale, problem.softcap)
    found = [*interpreted(part.forward, "triton"), *interpreted(part.backward, "triton", lse, delta)]
    firsts = [(q0, q1, dq)] * 3 + [(k0, k1, dk)] * 2
    return [move(x, first + by, last + by, -by) for x, (first, last, by) in zip(found, firsts, strict=True)]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_row_has_the_same_bits_wherever_and_with_whomever_it_is_computed(name):
    """out, lse, dq of rows 100 to 230 on a server that has no others; dk, dv of keys likewise."""
    problem = Problem.of(DOCUMENTS[name], 300, 300, (2, 1), 16).to(torch.float32)
    out, lse = interpreted(problem.forward, "triton")
    delta = delta_of(out, problem.d_out)
    expected = [out, lse, *interpreted(problem.backward, "triton", lse, delta)]
    by_rows, by_keys = (run_elsewhere(problem, lse, delta, *r) for r in ((100, 230, 0, 300), (0, 300, 100, 230)))
    for x, y in zip([*by_rows[:3], *by_keys[3:]], expected, strict=True):
        assert torch.equal(x[100:230], y[100:230])


def test_cutting_rows_anywhere_changes_no_bit():
    problem = Problem.of(DOCUMENTS["sinks and a window"], 300, 300, (1, 1), 16).to(torch.bfloat16)
    recut = joined(pieces_of(problem.tasks, [1, 128, 200], "q"))
    found, expected = interpreted(problem.run, "triton", recut), interpreted(problem.run, "triton")
    assert all(torch.equal(x, y) for x, y in zip(found[:3], expected[:3], strict=True))


def test_full_bands_see_all():
    problem = Problem.of(Bands.of((0, 5, 0, 300, NONE, ALL)), 5, 300, (2, 1), 16).to(torch.float32)
    assert_exact(interpreted(run_in_nan_memory, problem, "triton"), problem)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="would show that each variant is exact on its GPU")
@pytest.mark.parametrize("softcap", [0.0, 20.0])
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("name", [*MIXED, *LARGE])
def test_a_gpu_errs_at_most_twice_as_much_as_plain_attention(name, head_dim, softcap):
    problem = Problem.of(*CASES[name], (8, 2), head_dim, softcap).to(torch.bfloat16)
    found = run_in_nan_memory(problem.to(torch.bfloat16, "cuda"), "triton")
    assert_as_good_as_plain([x.cpu() for x in found], problem)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="would show that warps do not race for a block")
@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_gpu_gives_the_same_bits_a_thousand_times(head_dim):
    problem = Problem.of(*CASES["a window wider than its blocks"], (8, 2), head_dim).to(torch.bfloat16, "cuda")
    first = problem.run("triton")
    for _ in range(1000):
        assert all(torch.equal(x, y) for x, y in zip(problem.run("triton"), first, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(70, 3, 80), (5, 2, 256), (1, 1, 8), (0, 2, 64)], ids=str)
def test_delta_is_that_of_pytorch(shape, dtype):
    out, d_out = (torch.randn(shape).to(dtype) for _ in range(2))
    strided = d_out.transpose(0, 1).contiguous().transpose(0, 1)
    found = interpreted(delta_triton, out, strided)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), (out.double() * d_out.double()).sum(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="would show that delta comes from our kernel on a GPU")
def test_a_gpu_computes_delta():
    out, d_out = (torch.randn(999, 8, 128, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    torch.testing.assert_close(delta_of(out, d_out).double(), (out.double() * d_out.double()).sum(-1))
