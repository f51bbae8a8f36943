"""The program that moves rows between tensors and a message; `rows.py` says what that means."""

# Prefixes: i_ index, o_ offsets, b_ block in registers; *_ptr address.

import triton
import triton.language as tl

ROWS, WORDS = 16, 256  # of 4 bytes: 16 KiB at once


@triton.jit
def move_rows_kernel(parts_ptr, GATHERS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """Program (n, part) moves rows from n * ROWS on; a part is the addresses of x,
    index and packed, rows, words in a row."""
    part_ptr = parts_ptr + 5 * tl.program_id(1)
    x_ptr = tl.load(part_ptr).to(tl.pointer_type(tl.int32))
    index_ptr = tl.load(part_ptr + 1).to(tl.pointer_type(tl.int64))
    packed_ptr = tl.load(part_ptr + 2).to(tl.pointer_type(tl.int32))
    num_rows, num_words = tl.load(part_ptr + 3), tl.load(part_ptr + 4)
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    here = o_row < num_rows
    b_row = tl.load(index_ptr + o_row, mask=here, other=0)
    for word in range(0, num_words, WORDS):
        o_word = word + tl.arange(0, WORDS)
        moved = here[:, None] & (o_word < num_words)[None, :]
        inside_ptr = x_ptr + b_row[:, None] * num_words + o_word[None, :]
        beside_ptr = packed_ptr + o_row[:, None] * num_words + o_word[None, :]
        if GATHERS:
            tl.store(beside_ptr, tl.load(inside_ptr, mask=moved, other=0), mask=moved)
        else:
            tl.store(inside_ptr, tl.load(beside_ptr, mask=moved, other=0), mask=moved)
