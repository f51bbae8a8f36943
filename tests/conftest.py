"""Hypothesis without its clock: on a busy machine a slow example is no failure. In CI the same examples every time.
And PyTorch without its warnings about sockets."""

import os

from hypothesis import settings

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as `distca` does

settings.register_profile("distca", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("distca")
