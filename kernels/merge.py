"""How do two partial results of one query row, over different keys, become one?

Each part is normalised over its own keys and says with its log-sum-exp how much weight those keys had together. A row
that saw no key has out = 0 and lse = -inf, and stays so. All arithmetic is in the statistics dtype; the caller casts.

The order of folding decides the last bits, so every caller folds in plan order, never in order of arrival.
"""

# Shape suffixes: S rows, H query heads, D head size. `merge` takes any leading dimensions: `...D` and `...`.

import torch


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of lse and delta, and of every sum over keys or tasks: float64 for float64 inputs, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def merge(
    out: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fold `part` (..., D) with `part_lse` (...) into `out`, `lse`; returns the new pair, changes nothing in place."""
    total = torch.logaddexp(lse, part_lse)
    # weights from the difference, not from `total`: they sum to 1 even where lse is so large that its last bit matters;
    # a row that neither side attended has -inf twice, whose difference would be nan
    lead = (lse - part_lse).masked_fill(total == -torch.inf, 0.0)
    return lead.sigmoid()[..., None] * out + (-lead).sigmoid()[..., None] * part, total


def add_sinks(out_SHD: torch.Tensor, lse_SH: torch.Tensor, sinks_H: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What rows become when every head has a sink: one more key for all rows, with this score and the value 0.

    It belongs to a row once, wherever the row's keys are attended: fold it into the final result. Backward then needs
    nothing new, since lse and delta are those of the result with the sink."""
    return merge(out_SHD, lse_SH, torch.zeros_like(out_SHD), sinks_H.to(lse_SH.dtype).expand_as(lse_SH))


def sinks_gradient(lse_SH: torch.Tensor, delta_SH: torch.Tensor, sinks_H: torch.Tensor) -> torch.Tensor:
    """(H,) gradient of the sinks, from the lse and delta of rows that `add_sinks` has been applied to."""
    return -((sinks_H.to(lse_SH.dtype) - lse_SH).exp() * delta_SH).sum(0)
