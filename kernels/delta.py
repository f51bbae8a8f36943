"""What does backward subtract from every dP of a row? delta = rowsum(d_out * out), of the row's final output.

It is computed where the output is, and sent in its place; a fused operator that asks for `out` gets one that has it.
"""

# Shape suffixes: S rows, H query heads, D head size.

from importlib.util import find_spec

import torch

from distca.kernels.merge import statistics_dtype


def delta_of(out_SHD: torch.Tensor, d_out_SHD: torch.Tensor) -> torch.Tensor:
    """delta_SH in the statistics dtype."""
    stats = statistics_dtype(out_SHD.dtype)
    if out_SHD.device.type == "cuda" and stats == torch.float32 and find_spec("triton"):
        return delta_triton(out_SHD, d_out_SHD)
    return (out_SHD.to(stats) * d_out_SHD.to(stats)).sum(-1)


def delta_triton(out_SHD: torch.Tensor, d_out_SHD: torch.Tensor) -> torch.Tensor:
    """The same in float32, in one pass: what PyTorch would write and read again, the widened product, stays inside."""
    import triton  # here, so that a machine without Triton can import this file

    from distca.kernels.triton_attention import block_d, variant_of
    from distca.kernels.triton_kernels import KERNELS

    head_dim, on_gpu = out_SHD.shape[-1], out_SHD.device.type == "cuda"
    delta_SH = torch.empty(out_SHD.shape[:2], dtype=torch.float32, device=out_SHD.device)
    variant = variant_of("delta", head_dim, out_SHD.dtype, False, None, triton.__version__)
    programs = triton.cdiv(delta_SH.numel(), variant.block_q)
    if not programs:
        return delta_SH
    with torch.cuda.device(out_SHD.device if on_gpu else -1):
        KERNELS["delta"][(programs,)](
            out_SHD.contiguous(),
            d_out_SHD.contiguous(),
            delta_SH,
            delta_SH.numel(),
            D=head_dim,
            BLOCK_D=block_d(head_dim),
            BLOCK_Q=variant.block_q,
            num_warps=variant.num_warps,
        )
    return delta_SH


def out_with_delta(d_out_SHD: torch.Tensor, delta_SH: torch.Tensor) -> torch.Tensor:
    """A stand-in for the final output: the multiple of d_out with rowsum(d_out * out) = delta.

    PyTorch's operators use `out` for nothing else, and this spares sending it to the servers. It is the projection of
    out on d_out, so never longer than out; its row sum has terms of one sign, so rounding to bf16 costs it little."""
    wide_SHD = d_out_SHD.to(delta_SH.dtype)
    length_SH = _length(wide_SHD)
    length_SH = length_SH.masked_fill_(length_SH == 0, 1.0)  # where d_out is 0
    return (wide_SHD * (delta_SH / length_SH / length_SH)[..., None]).to(d_out_SHD.dtype)


def _length(x_SHD: torch.Tensor) -> torch.Tensor:
    """2-norm of every row, of tiny and huge ones too, whose squares leave the range of their dtype."""
    if x_SHD.device.type == "cuda":
        return torch.linalg.vector_norm(x_SHD, dim=-1, dtype=torch.float64).to(x_SHD.dtype)
    length_SH, limits = torch.linalg.vector_norm(x_SHD, dim=-1), torch.finfo(x_SHD.dtype)
    least = limits.tiny**0.5 / limits.eps  # what vanishes of a longer row is below its rounding
    is_odd = ~((length_SH > least) & (length_SH < limits.max**0.5))
    if is_odd.any():
        length_SH[is_odd] = torch.linalg.vector_norm(x_SHD[is_odd].double(), dim=-1).to(x_SHD.dtype)
    return length_SH
