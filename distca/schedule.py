"""Which learning rate does a step use?

A pure function of the settings and the step's number: nothing is stored, so a resumed run cannot differ from one that
never stopped, and a run whose settings change at a resume has, from there on, the rates of a run that had the new
settings from its first step.

    warm-up      step s of the first w = warmup_steps uses peak * s / (w + 1): no step is wasted on a rate of 0
    step w + 1   uses the peak
    after it     constant stays there; linear and cosine fall so that they would be at 0 one step after the last
"""

from __future__ import annotations

import math

from distca.config import ScheduleSettings


def learning_rate(schedule: ScheduleSettings, peak: float, step: int, steps: int) -> float:
    """The rate of step `step` (from 1) of a run of `steps`."""
    assert 1 <= step <= steps, f"step {step} of {steps}"
    warmup = schedule.warmup_steps
    if step <= warmup:
        return peak * step / (warmup + 1)
    gone = (step - warmup - 1) / (steps - warmup)  # 0 at the peak, 1 one step after the last
    shape = {"constant": 1.0, "linear": 1.0 - gone, "cosine": (1.0 + math.cos(math.pi * gone)) / 2}
    return peak * shape[schedule.name]
