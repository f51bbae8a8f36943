"""The programs of back end "triton": a query tile's output, its dq, a key tile's dk and dv.

What an item and its entries are is at the top of `worklist.py`. Each kernel has one loop over an item's blocks, keeps
its results in registers and stores them once; no atomics, so the same list gives the same bits.

    forward   tile of queries, blocks of keys    p = exp(s - running maximum)           out = sum p v / sum p
    dq        tile of queries, blocks of keys    p = exp(s - lse), ds = p (dp - delta)  dq = sum ds k
    dk, dv    tile of keys, blocks of queries    the same, transposed                   dk = sum ds^T q, dv = sum p^T do
    delta     tile of queries, no list                                                  delta = rowsum(do * out)

A program of dk, dv goes over all query heads that share its key head, so heads are neither copied nor added up after.

Rows are loaded in one of two ways. By address: rows outside of the entry become 0, so they may hold anything.
`DESCRIBED`, by tensor descriptor (TMA, on Hopper and later): rows outside of the buffer become 0, others are hidden by
the mask alone, so all rows of the buffer must be finite. Only described loops can be `SPECIALIZED`, that is, have warps
that load and warps that multiply. Triton 3.6 to 3.9 do so for loops shaped like these: one per kernel, without a
branch, with descriptors that the kernel makes. Other shapes they crash on or, worse, leave as they are without a word.
"""

# Prefixes: i_ index, o_ offsets, b_ block in registers; *_ptr address. H query heads, G key/value heads, D head size,
# BLOCK_D the power of two that holds it. Scores, lse2 and maxima are in base 2: exp2 is what the hardware has.

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
SIZES = [
    "num_rows",
    "num_keys",
    "stride",
]  # they change with every plan; a kernel for each would stop the run to compile


@triton.jit
def _advance(entries_ptr, i_entry, n):
    """The entry of an item's n-th block, and that block's number; `i_entry` is the entry of the block before."""
    i_entry += (n == tl.load(entries_ptr + 8 * i_entry + 1)).to(tl.int32)  # entries are not empty: at most one step
    return i_entry, n + tl.load(entries_ptr + 8 * i_entry)


@triton.jit
def _is_seen(entry_ptr, o_row, o_key):
    """(rows, keys) which pairs of a tile and a block are in the entry's band."""
    row0, row1 = tl.load(entry_ptr + 2), tl.load(entry_ptr + 3)
    key0, key1 = tl.load(entry_ptr + 4), tl.load(entry_ptr + 5)
    b_first = tl.maximum(o_row + tl.load(entry_ptr + 6), key0)
    b_last = tl.minimum(o_row + tl.load(entry_ptr + 7), key1 - 1)
    b_last = tl.where((o_row >= row0) & (o_row < row1), b_last, -1)
    return (o_key[None, :] >= b_first[:, None]) & (o_key[None, :] <= b_last[:, None])


@triton.jit
def _load(
    x,
    i_row,
    row0,
    row1,
    i_head,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    DESCRIBED: tl.constexpr,
):
    if DESCRIBED:
        b_x = x.load([i_row, i_head * D])
    else:
        o_row, o_d = i_row + tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
        seen = ((o_row >= row0) & (o_row < row1))[:, None] & (o_d < D)[None, :]
        b_x = tl.load(x + o_row.to(tl.int64)[:, None] * (HEADS * D) + i_head * D + o_d[None, :], mask=seen, other=0.0)
    return b_x


@triton.jit
def _store(
    x_ptr, b_x, i_row, num_rows, i_head, HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr
):
    o_row, o_d = i_row + tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    here = (o_row < num_rows)[:, None] & (o_d < D)[None, :]
    tl.store(
        x_ptr + o_row.to(tl.int64)[:, None] * (HEADS * D) + i_head * D + o_d[None, :],
        b_x.to(x_ptr.dtype.element_ty),
        mask=here,
    )


@triton.jit
def _load_statistic(x, i_row, row0, row1, i_head, stride, ROWS: tl.constexpr, DESCRIBED: tl.constexpr):
    if DESCRIBED:
        b_x = x.load([i_head, i_row]).reshape(ROWS)
    else:
        o_row = i_row + tl.arange(0, ROWS)
        b_x = tl.load(x + i_head.to(tl.int64) * stride + o_row, mask=(o_row >= row0) & (o_row < row1), other=0.0)
    return b_x


@triton.jit
def _tanh(x):
    # near 0 the quotient would cancel; the polynomial is Cephes' tanhf
    z = x * x
    near = (
        (((-5.70498872745e-3 * z + 2.06390887954e-2) * z - 5.37397155531e-2) * z + 1.33314422036e-1) * z
        - 3.33332819422e-1
    ) * z * x + x
    return tl.where(z < 0.390625, near, 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2E)) + 1.0))


@triton.jit(do_not_specialize=SIZES[:2])
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    items_ptr,
    entries_ptr,
    num_rows,
    num_keys,
    scale,
    softcap,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SOFTCAP: tl.constexpr,
    STAGES: tl.constexpr,
    DESCRIBED: tl.constexpr,
    SPECIALIZED: tl.constexpr,
):
    item_ptr = items_ptr + 4 * (tl.program_id(0) // (H // G))
    i_q, i_group = tl.load(item_ptr), tl.load(item_ptr + 1)
    i_entry, num_blocks = tl.load(item_ptr + 2), tl.load(item_ptr + 3)
    i_head = i_group * (H // G) + tl.program_id(0) % (H // G)
    if DESCRIBED:
        q = tl.make_tensor_descriptor(q_ptr, [num_rows, H * D], [H * D, 1], [BLOCK_Q, D])
        k = tl.make_tensor_descriptor(k_ptr, [num_keys, G * D], [G * D, 1], [BLOCK_K, D])
        v = tl.make_tensor_descriptor(v_ptr, [num_keys, G * D], [G * D, 1], [BLOCK_K, D])
    else:
        q, k, v = q_ptr, k_ptr, v_ptr
    o_q, o_k = i_q + tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K)
    b_q = _load(q, i_q, 0, num_rows, i_head, H, D, BLOCK_D, BLOCK_Q, DESCRIBED)
    b_top = tl.full([BLOCK_Q], float("-inf"), tl.float32)  # running maximum, in base 2
    b_sum = tl.zeros([BLOCK_Q], tl.float32)
    b_out = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    to_base2 = LOG2E if SOFTCAP else scale * LOG2E
    for n in tl.range(0, num_blocks, num_stages=STAGES, warp_specialize=SPECIALIZED):
        i_entry, block = _advance(entries_ptr, i_entry, n)
        entry_ptr, i_k = entries_ptr + 8 * i_entry, block * BLOCK_K
        key0, key1 = tl.load(entry_ptr + 4), tl.load(entry_ptr + 5)
        b_k = _load(k, i_k, key0, key1, i_group, G, D, BLOCK_D, BLOCK_K, DESCRIBED)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
        if SOFTCAP:
            b_s = softcap * _tanh(b_s * (scale / softcap))
        seen = _is_seen(entry_ptr, o_q, i_k + o_k)
        b_s = tl.where(seen, b_s, float("-inf"))
        b_new = tl.maximum(b_top, tl.max(b_s, 1) * to_base2)
        b_pivot = tl.where(b_new == float("-inf"), 0.0, b_new)  # -inf until the row has seen a key
        b_p = tl.exp2(b_s * to_base2 - b_pivot[:, None])
        b_fade = tl.exp2(b_top - b_pivot)
        b_v = _load(v, i_k, key0, key1, i_group, G, D, BLOCK_D, BLOCK_K, DESCRIBED)
        b_out = tl.dot(b_p.to(b_v.dtype), b_v, b_out * b_fade[:, None], input_precision="ieee")
        b_sum = b_sum * b_fade + tl.sum(b_p, 1)
        b_top = b_new
    b_safe = tl.where(b_sum > 0, b_sum, 1.0)
    _store(out_ptr, b_out / b_safe[:, None], i_q, num_rows, i_head, H, D, BLOCK_D, BLOCK_Q)
    tl.store(lse_ptr + o_q.to(tl.int64) * H + i_head, (b_top + tl.log2(b_safe)) * LN2, mask=o_q < num_rows)


@triton.jit(do_not_specialize=SIZES)
def dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    lse2_ptr,
    delta_ptr,
    d_out_ptr,
    dq_ptr,
    items_ptr,
    entries_ptr,
    num_rows,
    num_keys,
    stride,
    scale,
    softcap,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SOFTCAP: tl.constexpr,
    STAGES: tl.constexpr,
    DESCRIBED: tl.constexpr,
    SPECIALIZED: tl.constexpr,
):
    item_ptr = items_ptr + 4 * (tl.program_id(0) // (H // G))
    i_q, i_group = tl.load(item_ptr), tl.load(item_ptr + 1)
    i_entry, num_blocks = tl.load(item_ptr + 2), tl.load(item_ptr + 3)
    i_head = i_group * (H // G) + tl.program_id(0) % (H // G)
    if DESCRIBED:
        q = tl.make_tensor_descriptor(q_ptr, [num_rows, H * D], [H * D, 1], [BLOCK_Q, D])
        d_out = tl.make_tensor_descriptor(d_out_ptr, [num_rows, H * D], [H * D, 1], [BLOCK_Q, D])
        lse2 = tl.make_tensor_descriptor(lse2_ptr, [H, num_rows], [stride, 1], [1, BLOCK_Q])
        delta = tl.make_tensor_descriptor(delta_ptr, [H, num_rows], [stride, 1], [1, BLOCK_Q])
        k = tl.make_tensor_descriptor(k_ptr, [num_keys, G * D], [G * D, 1], [BLOCK_K, D])
        v = tl.make_tensor_descriptor(v_ptr, [num_keys, G * D], [G * D, 1], [BLOCK_K, D])
    else:
        q, k, v, lse2, delta, d_out = q_ptr, k_ptr, v_ptr, lse2_ptr, delta_ptr, d_out_ptr
    o_q, o_k = i_q + tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K)
    b_q = _load(q, i_q, 0, num_rows, i_head, H, D, BLOCK_D, BLOCK_Q, DESCRIBED)
    b_do = _load(d_out, i_q, 0, num_rows, i_head, H, D, BLOCK_D, BLOCK_Q, DESCRIBED)
    b_lse2 = _load_statistic(lse2, i_q, 0, num_rows, i_head, stride, BLOCK_Q, DESCRIBED)
    b_delta = _load_statistic(delta, i_q, 0, num_rows, i_head, stride, BLOCK_Q, DESCRIBED)
    b_dq = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for n in tl.range(0, num_blocks, num_stages=STAGES, warp_specialize=SPECIALIZED):
        i_entry, block = _advance(entries_ptr, i_entry, n)
        entry_ptr, i_k = entries_ptr + 8 * i_entry, block * BLOCK_K
        key0, key1 = tl.load(entry_ptr + 4), tl.load(entry_ptr + 5)
        b_k = _load(k, i_k, key0, key1, i_group, G, D, BLOCK_D, BLOCK_K, DESCRIBED)
        b_v = _load(v, i_k, key0, key1, i_group, G, D, BLOCK_D, BLOCK_K, DESCRIBED)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision="ieee")
        seen = _is_seen(entry_ptr, o_q, i_k + o_k)
        if SOFTCAP:
            b_bent = _tanh(b_s * (scale / softcap))
            b_ds = (
                tl.exp2(b_bent * (softcap * LOG2E) - b_lse2[:, None])
                * (b_dp - b_delta[:, None])
                * (1.0 - b_bent * b_bent)
            )
        else:
            b_ds = tl.exp2(b_s * (scale * LOG2E) - b_lse2[:, None]) * (b_dp - b_delta[:, None])
        b_ds = tl.where(seen, b_ds, 0.0)
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision="ieee")
    _store(dq_ptr, b_dq * scale, i_q, num_rows, i_head, H, D, BLOCK_D, BLOCK_Q)


@triton.jit(do_not_specialize=SIZES)
def dkdv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    lse2_ptr,
    delta_ptr,
    d_out_ptr,
    dk_ptr,
    dv_ptr,
    items_ptr,
    entries_ptr,
    num_rows,
    num_keys,
    stride,
    scale,
    softcap,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SOFTCAP: tl.constexpr,
    STAGES: tl.constexpr,
    DESCRIBED: tl.constexpr,
    SPECIALIZED: tl.constexpr,
):
    # the list is that of the transposed tasks: its "rows" are keys here, its "keys" queries
    item_ptr = items_ptr + 4 * tl.program_id(0)
    i_k, i_group = tl.load(item_ptr), tl.load(item_ptr + 1)
    first_entry, num_blocks = tl.load(item_ptr + 2), tl.load(item_ptr + 3)
    if DESCRIBED:
        q = tl.make_tensor_descriptor(q_ptr, [num_rows, H * D], [H * D, 1], [BLOCK_Q, D])
        d_out = tl.make_tensor_descriptor(d_out_ptr, [num_rows, H * D], [H * D, 1], [BLOCK_Q, D])
        lse2 = tl.make_tensor_descriptor(lse2_ptr, [H, num_rows], [stride, 1], [1, BLOCK_Q])
        delta = tl.make_tensor_descriptor(delta_ptr, [H, num_rows], [stride, 1], [1, BLOCK_Q])
        k = tl.make_tensor_descriptor(k_ptr, [num_keys, G * D], [G * D, 1], [BLOCK_K, D])
        v = tl.make_tensor_descriptor(v_ptr, [num_keys, G * D], [G * D, 1], [BLOCK_K, D])
    else:
        q, k, v, lse2, delta, d_out = q_ptr, k_ptr, v_ptr, lse2_ptr, delta_ptr, d_out_ptr
    o_q, o_k = tl.arange(0, BLOCK_Q), i_k + tl.arange(0, BLOCK_K)
    b_k = _load(k, i_k, 0, num_keys, i_group, G, D, BLOCK_D, BLOCK_K, DESCRIBED)
    b_v = _load(v, i_k, 0, num_keys, i_group, G, D, BLOCK_D, BLOCK_K, DESCRIBED)
    b_dk = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    i_entry = first_entry
    per_head = tl.maximum(num_blocks, 1)  # a loop over nothing may still be prepared
    for step in tl.range(0, num_blocks * (H // G), num_stages=STAGES, warp_specialize=SPECIALIZED):
        i_head, n = i_group * (H // G) + step // per_head, step % per_head
        i_entry, block = _advance(entries_ptr, tl.where(n == 0, first_entry, i_entry), n)
        entry_ptr, i_q = entries_ptr + 8 * i_entry, block * BLOCK_Q
        row0, row1 = tl.load(entry_ptr + 4), tl.load(entry_ptr + 5)
        b_q = _load(q, i_q, row0, row1, i_head, H, D, BLOCK_D, BLOCK_Q, DESCRIBED)
        b_do = _load(d_out, i_q, row0, row1, i_head, H, D, BLOCK_D, BLOCK_Q, DESCRIBED)
        b_lse2 = _load_statistic(lse2, i_q, row0, row1, i_head, stride, BLOCK_Q, DESCRIBED)
        b_delta = _load_statistic(delta, i_q, row0, row1, i_head, stride, BLOCK_Q, DESCRIBED)
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision="ieee")  # (BLOCK_K, BLOCK_Q), as all products here
        seen = _is_seen(entry_ptr, o_k, i_q + o_q)
        if SOFTCAP:
            b_bent = _tanh(b_s * (scale / softcap))
            b_p = tl.exp2(b_bent * (softcap * LOG2E) - b_lse2[None, :])
        else:
            b_p = tl.exp2(b_s * (scale * LOG2E) - b_lse2[None, :])
        b_p = tl.where(seen, b_p, 0.0)
        b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision="ieee")
        b_dp = tl.dot(b_v, tl.trans(b_do), input_precision="ieee")
        b_ds = b_p * (b_dp - b_delta[None, :])
        if SOFTCAP:
            b_ds *= 1.0 - b_bent * b_bent
        if not DESCRIBED:  # keys of no task may be nan, which 0 does not cancel
            b_ds = tl.where(seen, b_ds, 0.0)
        b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision="ieee")
    _store(dk_ptr, b_dk * scale, i_k, num_keys, i_group, G, D, BLOCK_D, BLOCK_K)
    _store(dv_ptr, b_dv, i_k, num_keys, i_group, G, D, BLOCK_D, BLOCK_K)


@triton.jit(do_not_specialize=["num_lines"])
def delta_kernel(
    out_ptr, d_out_ptr, delta_ptr, num_lines, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr
):
    # a line is one head of one row
    o_line, o_d = tl.program_id(0).to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_D)
    o_x, here = o_line[:, None] * D + o_d[None, :], (o_line < num_lines)[:, None] & (o_d < D)[None, :]
    b_out = tl.load(out_ptr + o_x, mask=here, other=0.0).to(tl.float32)  # (BLOCK_Q, BLOCK_D)
    b_do = tl.load(d_out_ptr + o_x, mask=here, other=0.0).to(tl.float32)
    tl.store(delta_ptr + o_line, tl.sum(b_out * b_do, axis=1), mask=o_line < num_lines)


KERNELS = {"forward": forward_kernel, "dq": dq_kernel, "dkdv": dkdv_kernel, "delta": delta_kernel}
