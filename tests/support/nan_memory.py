"""What did a kernel forget to write? Within `nan_memory()`, fresh memory holds nan (integers: the largest value)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def nan_memory() -> Iterator[None]:
    """PyTorch's own debugging mode: it fills what `torch.empty` and its kin return, in operators written in C++ too."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3).isnan().all(), "torch.utils.deterministic.fill_uninitialized_memory is off"
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
