"""What do the Triton kernels take of a GPU that is not here?

Triton compiles for any GPU on any machine. `python -m distca.kernels.aot` prints, for every variant, what the compiler
made of it; the tests hold the same figures to their limits. What only a GPU can show, speed above all, is not here.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from distca.kernels.triton_attention import Variant, constants_of, variant_of
from distca.kernels.triton_kernels import KERNELS

SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}  # bytes that one program may have; compilers do not check it
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
HEADS, GROUPS = 32, 8


@dataclass(frozen=True, slots=True)
class Build:
    """A kernel as it would be launched for these inputs."""

    kernel: str
    capability: int
    head_dim: int
    dtype: torch.dtype = torch.bfloat16
    softcap: bool = False

    def __str__(self) -> str:
        bent = ", softcap" if self.softcap else ""
        return f"{self.kernel} sm_{self.capability} D={self.head_dim} {NAMES[self.dtype]}{bent}"

    def variant(self) -> Variant:
        capability = divmod(self.capability, 10)
        return variant_of(self.kernel, self.head_dim, self.dtype, self.softcap, capability, triton.__version__)


@dataclass(frozen=True, slots=True)
class Resources:
    """What one program takes."""

    registers: int
    shared: int
    """Bytes."""
    stack: int
    """Bytes of local memory per thread: registers that did not fit."""
    spills: int
    """Instructions that store to it or load from it."""
    tensor_core: int
    """Matrix instructions: HGMMA on Hopper, tcgen05 (HMMA in small tiles) on Blackwell, HMMA before."""
    warps: int
    """All of them, also those that only load."""
    specialized: bool


def builds() -> Iterator[Build]:
    """Every variant that `variant_of` can choose, and head sizes that share one."""
    kernels, sizes = ("forward", "dq", "dkdv"), (64, 128, 256)
    for size, softcap, kernel in product(sizes, (False, True), kernels):
        yield Build(kernel, 90, size, softcap=softcap)
    for capability, size, kernel in product((80, 100), sizes, kernels):
        yield Build(kernel, capability, size)
    for size, kernel in product((80, 96), kernels):
        yield Build(kernel, 90, size)
    for size, kernel in product(sizes, kernels):
        yield Build(kernel, 90, size, torch.float32)
    for kernel in kernels:
        yield Build(kernel, 90, 128, torch.float16)
    for capability, size in product((80, 90, 100), sizes):
        yield Build("delta", capability, size)


def compile_for(build: Build) -> Resources:
    """Compile for a GPU that need not be here, and read what the machine code takes."""
    variant, function = build.variant(), KERNELS[build.kernel]
    names = function.arg_names
    constants = constants_of(variant, HEADS, GROUPS, build.head_dim, build.softcap)
    constants = {name: value for name, value in constants.items() if name in names}
    types = {name: _type_of(name, build) for name in names if name not in constants}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in types if name.endswith("_ptr")}
    source = ASTSource(
        fn=function,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs=aligned,
    )
    options = dict(num_warps=variant.num_warps, num_stages=variant.num_stages)
    made = triton.compile(source, target=GPUTarget("cuda", build.capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage, code = _run("cuobjdump", "-res-usage", file.name), _run("nvdisasm", "-c", file.name)
    matrix = {80: r"\bHMMA", 90: r"\bHGMMA", 100: r"\b(?:UTC\w*MMA|HMMA)"}[build.capability]
    return Resources(
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        shared=made.metadata.shared,
        stack=int(re.search(r"STACK:(\d+)", usage)[1]),
        spills=len(re.findall(r"\b(?:STL|LDL)\b", code)),
        tensor_core=len(re.findall(matrix, code)),
        warps=made.metadata.num_warps,
        specialized="ttg.warp_specialize" in made.asm["ttgir"],
    )


def _type_of(name: str, build: Build) -> str:
    if name in ("items_ptr", "entries_ptr"):
        return "*i32"
    if name in ("lse_ptr", "lse2_ptr", "delta_ptr"):
        return "*fp32"
    if name in ("scale", "softcap"):
        return "fp32"
    return "*" + NAMES[build.dtype] if name.endswith("_ptr") else "i32"


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


def main() -> None:
    row = "{:38} {:>8} {:>5} {:>6} {:>9} {:>8} {:>6} {:>6} {:>12} {}"
    columns = ("q x k", "warps", "stages", "registers", "shared", "stack", "spills", "tensor cores", "form")
    print(row.format(f"Triton {triton.__version__}", *columns))
    for build in builds():
        variant, found = build.variant(), compile_for(build)
        form = "specialized" if found.specialized else "described" if variant.described else "by address"
        tile, over = f"{variant.block_q}x{variant.block_k}", found.shared > SHARED_LIMIT[build.capability]
        sizes = (tile, found.warps, variant.num_stages, found.registers, found.shared, found.stack, found.spills)
        print(row.format(str(build), *sizes, found.tensor_core, form + " TOO MUCH SHARED MEMORY" * over))
        sys.stdout.flush()


if __name__ == "__main__":
    main()
