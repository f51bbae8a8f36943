"""How do other methods compute core attention over ranks? Three of them, to race against ours.

    local        every document lies whole on one rank, which attends it; nothing moves
    ulysses      rows are exchanged for heads: each rank attends all rows of its share of the heads
    all-gather   ranks hold zigzag chunks of each long document, and gather its keys and values once per layer

Each is, like `CoreAttention`, what a model receives as the keyword `distca`, with the layout of documents that it
needs. All use the kernels that DistCA uses, and what attention calls return is kept by activation checkpointing, as it
is for DistCA. Communication goes over the default process group and comes in adjoint pairs.

Ulysses: Jacobs et al., *DeepSpeed Ulysses*, arXiv 2309.14509. All-gather of keys and values: *The Llama 3 Herd of
Models*, arXiv 2407.21783, section 3.3.2; zigzag chunks per document as in Megatron-LM and TransformerEngine.
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist

from distca.arrays import order_by, ranges, sum_by
from distca.kernels.attention import attend, attend_backward
from distca.kernels.delta import delta_of
from distca.kernels.merge import statistics_dtype
from distca.layouts import in_order, tasks_of, whole_documents, zigzag
from distca.masks import Bands, MaskRule
from distca.placement import Segments

# Shape suffixes: T rows on this rank, S rows and C keys that it attends, H query heads, G key/value heads, D head size.

FULLEST = 1.25  # rows that a rank may hold under local packing, as a multiple of an equal share
SHORTEST_CUT = 128  # rows of a zigzag chunk: less than a kernel's tile would cost a whole one


class Baseline(Protocol):
    """A method of context parallelism: where documents lie, and what a model calls for core attention."""

    def __init__(self, rank: int, ranks: int, lengths: np.ndarray, backend: str): ...

    @staticmethod
    def layout(lengths: np.ndarray, ranks: int) -> Segments: ...

    @staticmethod
    def refusal(query_heads: Sequence[int], lengths: np.ndarray, ranks: int) -> str | None:
        """Why this method cannot train layers of so many query heads on these documents; None where it can."""

    def __call__(self, q_THD, k_TGD, v_TGD, rule: MaskRule, scale: float, softcap: float = 0.0) -> torch.Tensor: ...


class LocalAttention:
    """Local packing: a rank attends its own documents."""

    def __init__(self, rank: int, ranks: int, lengths: np.ndarray, backend: str):
        own = self.layout(lengths, ranks).of_rank(rank)
        self._attention = _Attention(lengths, own, own.row, backend)

    @staticmethod
    def layout(lengths: np.ndarray, ranks: int) -> Segments:
        return whole_documents(lengths, ranks)

    @staticmethod
    def refusal(query_heads: Sequence[int], lengths: np.ndarray, ranks: int) -> str | None:
        segments = whole_documents(lengths, ranks)
        share = int(lengths.sum()) // ranks
        fullest, longest = int(sum_by(segments.rank, segments.end - segments.start, ranks).max()), int(lengths.max())
        if fullest <= FULLEST * share:
            return None
        if longest > FULLEST * share:
            return f"a document of {longest:,} tokens is longer than a rank holds ({share:,})"
        return f"whole documents leave a rank with {fullest:,} tokens, more than it holds ({share:,})"

    def __call__(self, q_THD, k_TGD, v_TGD, rule: MaskRule, scale: float, softcap: float = 0.0) -> torch.Tensor:
        return self._attention(q_THD, k_TGD, v_TGD, rule, scale, softcap)


class UlyssesAttention:
    """Rows for heads, and back. Key/value heads that are fewer than ranks are repeated."""

    def __init__(self, rank: int, ranks: int, lengths: np.ndarray, backend: str):
        everything = in_order(lengths, 1)
        self._attention, self._ranks = _Attention(lengths, everything, everything.row, backend), ranks

    @staticmethod
    def layout(lengths: np.ndarray, ranks: int) -> Segments:
        return in_order(lengths, ranks)

    @staticmethod
    def refusal(query_heads: Sequence[int], lengths: np.ndarray, ranks: int) -> str | None:
        odd = next((heads for heads in query_heads if heads % ranks), None)
        return None if odd is None else f"{odd} query heads cannot be shared out evenly over {ranks} trainers"

    def __call__(self, q_THD, k_TGD, v_TGD, rule: MaskRule, scale: float, softcap: float = 0.0) -> torch.Tensor:
        repeats = math.lcm(k_TGD.shape[1], self._ranks) // k_TGD.shape[1]
        if repeats > 1:
            k_TGD, v_TGD = (x.repeat_interleave(repeats, 1) for x in (k_TGD, v_TGD))
        rows = heads_out(q_THD, k_TGD, v_TGD)
        return heads_home(self._attention(*rows, rule, scale, softcap))


class AllGatherAttention:
    """Own query rows against the gathered keys and values of the documents that are cut, and its own of the others."""

    def __init__(self, rank: int, ranks: int, lengths: np.ndarray, backend: str):
        segments = self.layout(lengths, ranks)
        is_cut = segments.end - segments.start < lengths[segments.document]
        own, own_is_cut = segments.of_rank(rank), is_cut[segments.rank == rank]
        self.num_cut_rows = int((own.end - own.start)[own_is_cut].sum())
        """Of this rank; they come first."""
        held = sum_by(segments.rank[is_cut], (segments.end - segments.start)[is_cut], ranks)
        self.most_cut_rows = int(held.max(initial=0))
        """Of any rank: collectives want equal parts, so that less is filled up to this."""

        # ranks come one after the other in what is gathered, each with its keys and then its values
        parts = np.flatnonzero(is_cut)
        parts = parts[order_by(segments.document[parts], segments.start[parts])]
        gathered = segments.rank[parts] * 2 * self.most_cut_rows + segments.row[parts]
        self.key_rows = torch.from_numpy(ranges(gathered, (segments.end - segments.start)[parts]))
        self.value_rows = self.key_rows + self.most_cut_rows
        """Where the keys of all cut documents, in their order, lie in what is gathered."""

        cut_lengths = np.zeros(len(lengths), np.int64)
        cut_lengths[segments.document[parts]] = lengths[segments.document[parts]]
        first_cut = (np.cumsum(cut_lengths) - cut_lengths)[own.document]
        first_own = len(self.key_rows) + own.row - self.num_cut_rows
        self._attention = _Attention(lengths, own, np.where(own_is_cut, first_cut, first_own), backend)
        self._ranks, self._number = ranks, _known(self)

    @staticmethod
    def layout(lengths: np.ndarray, ranks: int) -> Segments:
        return zigzag(lengths, ranks, 2 * ranks * SHORTEST_CUT if ranks > 1 else int(lengths.max()) + 1)

    @staticmethod
    def refusal(query_heads: Sequence[int], lengths: np.ndarray, ranks: int) -> str | None:
        return None

    def __call__(self, q_THD, k_TGD, v_TGD, rule: MaskRule, scale: float, softcap: float = 0.0) -> torch.Tensor:
        if len(self.key_rows):
            k_TGD, v_TGD = gather_keys(k_TGD, v_TGD, self._number)
        return self._attention(q_THD, k_TGD, v_TGD, rule, scale, softcap)

    def gather(self, k_TGD: torch.Tensor, v_TGD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all cut documents, in their order, and then of this rank's whole ones: (C, G, D)."""
        kept, most = self.num_cut_rows, self.most_cut_rows
        self.key_rows, self.value_rows = (rows.to(k_TGD.device) for rows in (self.key_rows, self.value_rows))
        own = k_TGD.new_empty(2, most, *k_TGD.shape[1:])
        own[0, :kept], own[1, :kept] = k_TGD[:kept], v_TGD[:kept]
        gathered = k_TGD.new_empty(self._ranks * 2 * most, *k_TGD.shape[1:])
        dist.all_gather_into_tensor(gathered, own.flatten(0, 1))
        found = []
        for x_TGD, rows in (k_TGD, self.key_rows), (v_TGD, self.value_rows):
            x_CGD = x_TGD.new_empty(len(rows) + len(x_TGD) - kept, *x_TGD.shape[1:])
            torch.index_select(gathered, 0, rows, out=x_CGD[: len(rows)])
            x_CGD[len(rows) :] = x_TGD[kept:]
            found.append(x_CGD)
        return tuple(found)

    def scatter(self, dk_CGD: torch.Tensor, dv_CGD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The adjoint of `gather`: every rank's share of the cut documents, summed, and this rank's whole ones."""
        kept, most, heads = self.num_cut_rows, self.most_cut_rows, dk_CGD.shape[1:]
        shares = dk_CGD.new_empty(self._ranks * 2 * most, *heads)
        for x_CGD, rows in (dk_CGD, self.key_rows), (dv_CGD, self.value_rows):
            shares.index_copy_(0, rows, x_CGD[: len(rows)])
        received = torch.empty_like(shares)
        # an exchange and a sum send what a reduce-scatter does, in half precision round once, and on Gloo are faster
        dist.all_to_all_single(received, shares)
        sums = received.view(self._ranks, 2, most, *heads).sum(0, dtype=statistics_dtype(dk_CGD.dtype))
        found = []
        for x_CGD, rows, own in (dk_CGD, self.key_rows, sums[0]), (dv_CGD, self.value_rows, sums[1]):
            x_TGD = x_CGD.new_empty(kept + len(x_CGD) - len(rows), *heads)
            x_TGD[:kept], x_TGD[kept:] = own[:kept], x_CGD[len(rows) :]
            found.append(x_TGD)
        return tuple(found)


BASELINES: dict[str, type[Baseline]] = {
    "local": LocalAttention,
    "ulysses": UlyssesAttention,
    "all-gather": AllGatherAttention,
}


class _Attention:
    """Attends a list of tasks that the layout gives; keeps the bands of each mask."""

    def __init__(self, lengths: np.ndarray, segments: Segments, first_key: np.ndarray, backend: str):
        self._where, self.backend = (lengths, segments, first_key), backend
        self._tasks: dict[int, Bands] = {}
        self._number = _known(self)

    def tasks(self, window: int) -> Bands:
        if window not in self._tasks:
            self._tasks[window] = tasks_of(MaskRule(window), *self._where)
        return self._tasks[window]

    def __call__(self, q_SHD, k_CGD, v_CGD, rule: MaskRule, scale: float, softcap: float) -> torch.Tensor:
        out_SHD, _lse = attend_rows(q_SHD, k_CGD, v_CGD, self._number, rule.window, scale, softcap)
        return out_SHD


# An operator's arguments are tensors and numbers, so whoever it works for is named by a number;
# it lives as long as its micro-batch.
_numbers = itertools.count()
_by_number: weakref.WeakValueDictionary[int, object] = weakref.WeakValueDictionary()


def _known(owner: object) -> int:
    number = next(_numbers)
    _by_number[number] = owner
    return number


@torch.library.custom_op("distca::attend_rows", mutates_args=())
def attend_rows(
    q_SHD: torch.Tensor,
    k_CGD: torch.Tensor,
    v_CGD: torch.Tensor,
    number: int,
    window: int,
    scale: float,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out (S, H, D) and lse (S, H)."""
    attention = _by_number[number]
    options = dict(scale=scale, softcap=softcap, backend=attention.backend)
    return attend(q_SHD, k_CGD, v_CGD, attention.tasks(window), **options)


def _attend_context(ctx, inputs, output):
    *rows, number, ctx.window, ctx.scale, ctx.softcap = inputs
    ctx.attention = _by_number[number]
    ctx.save_for_backward(*rows, *output)


def _attend_backward(ctx, d_out_SHD, _d_lse):
    q_SHD, k_CGD, v_CGD, out_SHD, lse_SH = ctx.saved_tensors
    d_out_SHD, tasks = d_out_SHD.contiguous(), ctx.attention.tasks(ctx.window)
    options = dict(scale=ctx.scale, softcap=ctx.softcap, backend=ctx.attention.backend)
    delta_SH = delta_of(out_SHD, d_out_SHD)
    gradients = attend_backward(q_SHD, k_CGD, v_CGD, lse_SH, delta_SH, d_out_SHD, tasks, **options)
    return (*gradients, None, None, None, None)


attend_rows.register_autograd(_attend_backward, setup_context=_attend_context)


@torch.library.custom_op("distca::gather_keys", mutates_args=())
def gather_keys(k_TGD: torch.Tensor, v_TGD: torch.Tensor, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`AllGatherAttention.gather`; its adjoint is `scatter`."""
    return _by_number[number].gather(k_TGD, v_TGD)


def _gather_context(ctx, inputs, output):
    ctx.method = _by_number[inputs[2]]


def _gather_backward(ctx, dk_CGD, dv_CGD):
    return (*ctx.method.scatter(dk_CGD, dv_CGD), None)


gather_keys.register_autograd(_gather_backward, setup_context=_gather_context)


@torch.library.custom_op("distca::heads_out", mutates_args=())
def heads_out(
    q_THD: torch.Tensor, k_TGD: torch.Tensor, v_TGD: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Own rows of all heads become all rows of own heads. Its adjoint is `heads_home`, of each."""
    return tuple(_rows_for_heads([q_THD, k_TGD, v_TGD]))


@torch.library.custom_op("distca::heads_home", mutates_args=())
def heads_home(out_SHD: torch.Tensor) -> torch.Tensor:
    """All rows of own heads become own rows of all heads. Its adjoint is `heads_out`."""
    return _heads_for_rows([out_SHD])[0]


heads_out.register_autograd(lambda ctx, *gradients: tuple(_heads_for_rows([g.contiguous() for g in gradients])))
heads_home.register_autograd(lambda ctx, gradient: _rows_for_heads([gradient])[0])


def _rows_for_heads(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """(T, H, D) -> (ranks * T, H / ranks, D) each, all on their way at the same time."""
    ranks = dist.get_world_size()
    sent = [x.unflatten(1, (ranks, -1)).transpose(0, 1).contiguous() for x in tensors]
    received = _exchanged(sent)
    return [x.flatten(0, 1) for x in received]


def _heads_for_rows(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """(ranks * T, H, D) -> (T, ranks * H, D) each."""
    ranks = dist.get_world_size()
    received = _exchanged([x.unflatten(0, (ranks, -1)) for x in tensors])
    return [x.transpose(0, 1).flatten(1, 2) for x in received]


def _exchanged(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """(ranks, ...) each: the n-th part goes to rank n, and what rank n sent comes as the n-th."""
    received = [torch.empty_like(x) for x in tensors]
    pairs = zip(received, tensors, strict=True)
    for work in [dist.all_to_all_single(got, sent, async_op=True) for got, sent in pairs]:
        work.wait()
    return received
