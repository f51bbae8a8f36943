"""Hypothesis without its clock: on a busy machine a slow example is no failure. In CI the same examples every time."""

import os

from hypothesis import settings

settings.register_profile("distca", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("distca")
