"""Every variant of the Triton kernels compiles for its GPU, fits into it, and is what it claims to be."""

import pytest
import torch

triton = pytest.importorskip("triton", reason="would show what the kernels take of each GPU")

from distca.kernels import aot  # noqa: E402 - only where there is Triton
from distca.kernels.aot import SHARED_LIMIT, Build, builds, compile_for  # noqa: E402

ALL = list(builds())
MOST_USED = [b for b in ALL if (b.capability, b.head_dim, b.dtype, b.softcap) == (90, 128, torch.bfloat16, False)]
# most bytes of registers that do not fit, as recorded for each version of Triton: half precision per GPU, and float32
STACK = {
    "3.6": {80: 8, 90: 8, 100: 16, "float32": 264},
    "3.7": {80: 0, 90: 0, 100: 8, "float32": 0},
    "3.9": {80: 0, 90: 88, 100: 0, "float32": 272},
}
VERSION = ".".join(triton.__version__.split(".")[:2])
RECORDED = pytest.mark.skipif(
    VERSION not in STACK, reason=f"would show what Triton {VERSION} makes of the kernels; nothing is recorded for it"
)


@RECORDED
@pytest.mark.parametrize(
    "build", [b if b in MOST_USED else pytest.param(b, marks=pytest.mark.slow) for b in ALL], ids=str
)
def test_a_variant_compiles_fits_and_is_what_it_claims(build):
    variant, found = build.variant(), compile_for(build)
    assert found.shared <= SHARED_LIMIT[build.capability]
    assert found.stack <= STACK[VERSION]["float32" if build.dtype == torch.float32 else build.capability]
    assert found.specialized == variant.specialized, "Triton says nothing where it does not specialise"
    assert found.warps == variant.num_warps + (8 if variant.specialized else 0)  # 4 that load, 2 x 4 that multiply
    assert (found.tensor_core > 0) == (build.dtype != torch.float32 and build.kernel != "delta")


def test_hopper_gets_warp_specialised_kernels():
    assert all(Build(kernel, 90, d).variant().specialized for kernel in ("forward", "dkdv") for d in (64, 128))


def test_the_table_is_printed_by_a_command(monkeypatch, capsys):
    monkeypatch.setattr(aot, "builds", lambda: iter(MOST_USED[:1]))
    aot.main()
    head, row = capsys.readouterr().out.splitlines()
    assert head.startswith("Triton 3.") and "registers" in head
    assert row.startswith("forward sm_90 D=128 bf16") and row.endswith("specialized")
    assert "TOO MUCH" not in row
