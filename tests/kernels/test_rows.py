"""Rows get into messages and out of them, by operators and by one launch alike."""

import pytest
import torch
import triton
from interpreter import interpreted
from nan_memory import nan_memory
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from distca.kernels.rows import Part, gather, move_triton, scatter
from distca.kernels.triton_rows import ROWS, WORDS, move_rows_kernel

SHAPES = [(40, 8, 16), (40, 2, 16), (40, 2, 16), (40, 8)]
COUNTS = [17, 33, 33, 17]
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def make_parts(dtype):
    g = torch.Generator().manual_seed(1)
    parts = []
    for shape, count in zip(SHAPES, COUNTS, strict=True):
        x = torch.randn(shape, generator=g).to(dtype)
        parts.append(Part(x, torch.randperm(len(x), generator=g)[:count], torch.empty(count, *shape[1:], dtype=dtype)))
    return parts


def moved(by_triton: bool, dtype: torch.dtype) -> list[torch.Tensor]:
    """What gathering gives, then what scattering that onto zeros gives."""
    with nan_memory():
        parts = make_parts(dtype)
    move_triton(parts, True) if by_triton else gather(parts)
    back = [part._replace(x=torch.zeros_like(part.x)) for part in parts]
    move_triton(back, False) if by_triton else scatter(back)
    return [part.packed for part in parts] + [part.x for part in back]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_are_gathered_and_put_back(dtype):
    parts, found = make_parts(dtype), moved(False, dtype)
    for part, packed, back in zip(parts, found[: len(parts)], found[len(parts) :], strict=True):
        assert torch.equal(packed, part.x[part.index])
        assert torch.equal(back[part.index], packed)
        assert back.count_nonzero() == packed.count_nonzero()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_launch_moves_what_operators_do(dtype):
    found = interpreted(moved, True, dtype)
    for ours, theirs in zip(found, moved(False, dtype), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="would show that a GPU moves the right rows in one launch")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gpu_moves_what_operators_do(dtype):
    parts = [Part(*(x.to("cuda") for x in part)) for part in make_parts(dtype)]
    for _ in range(20):  # the table of one launch may be where that of the launch before was
        gather(parts)
        back = [part._replace(x=torch.zeros_like(part.x)) for part in parts]
        scatter(back)
        found = [part.packed.cpu() for part in parts] + [part.x.cpu() for part in back]
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, moved(False, dtype), strict=True))


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("gathers", [True, False])
def test_the_launch_compiles_for_gpus_that_are_not_here(gathers, capability):
    """That a GPU moves the right rows with it, only one can show."""
    names = move_rows_kernel.arg_names
    constants = {(names.index(n),): v for n, v in dict(GATHERS=gathers, ROWS=ROWS, WORDS=WORDS).items()}
    signature = {name: "constexpr" for name in names} | {"parts_ptr": "*i64"}
    source = ASTSource(fn=move_rows_kernel, signature=signature, constexprs=constants)
    assert triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]


def test_nothing_is_moved_without_rows():
    x, before = torch.ones(3, 2), torch.ones(3, 2)
    nothing = Part(x, torch.empty(0, dtype=torch.int64), x[:0])
    for move in gather, scatter:
        move([nothing])
        move([])
        assert torch.equal(x, before) and nothing.packed.shape == (0, 2)
