"""Paired comparison of two sets of scores on the same samples, and how many samples an interval needs."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb
from statistics import median

import numpy as np

from vtwcli.results.evaluation import Difference, McNemar, SpeedUp

FEWEST = 6
"""Distinct samples that a 95 % interval needs, see ``enough``."""


def enough(tasks: Sequence[str], each: bool = False) -> bool:
    """Whether resampling distinct samples, one task name each, can give a 95 % interval at all.

    Whatever is drawn with replacement from n samples lies between the smallest and the largest of them, and these
    two enclose the median of the population with a chance of 1 - 2^(1-n): 94 % for five samples, 97 % for six. So no
    interval from fewer than six can hold what it says, however often it is resampled. With one sample it would always
    be a point. Resampling within tasks leaves every task its share, so each task takes one of the samples' n - 1
    degrees of freedom: what is needed is n - (number of tasks) >= 5.

    Args:
        each: whether every task is judged by its own samples alone and needs six of them.
    """
    counts = [tasks.count(task) for task in set(tasks)]
    least = min(counts, default=0) if each else sum(count - 1 for count in counts) + 1
    return least >= FEWEST


def paired_difference(
    full: Sequence[float], pruned: Sequence[float], resamples: int, seed: int
) -> Difference:
    """Mean of ``pruned - full`` with a paired bootstrap interval.

    Args:
        full, pruned: scores of the same samples in the same order.
        resamples: bootstrap resamples of the samples; 0 for no interval.

    Returns:
        The interval is from the 2.5 % to the 97.5 % quantile; None also where there are too few samples (``enough``).
    """
    change = np.asarray(pruned, dtype=np.float64) - np.asarray(full, dtype=np.float64)
    interval = None
    if resamples and enough([""] * len(change)):
        rows = np.random.default_rng(seed).integers(0, len(change), (resamples, len(change)))
        interval = [float(x) for x in np.quantile(change[rows].mean(axis=1), (0.025, 0.975))]
    return {"difference": float(change.mean()), "interval": interval}


def mcnemar(full: Sequence[float], pruned: Sequence[float]) -> McNemar:
    """McNemar's exact test of right-or-wrong scores (1 is right, anything less is wrong).

    With b samples that only the full model gets right and c that only the pruned one does, the two-sided p is
    ``min(1, 2 · Σ_{i <= min(b, c)} C(b + c, i) / 2^(b + c))`` (McNemar, 1947; exact binomial form).
    """
    pairs = [(f >= 1, p >= 1) for f, p in zip(full, pruned, strict=True)]
    b = sum(f and not p for f, p in pairs)
    c = sum(p and not f for f, p in pairs)
    tail = sum(comb(b + c, i) for i in range(min(b, c) + 1)) / 2 ** (b + c)
    return {"only_full": b, "only_pruned": c, "p": min(1.0, 2 * tail)}


def first_divergence(full: Sequence[int], pruned: Sequence[int]) -> int | None:
    """The first position at which two token sequences differ, or None where they are equal."""
    for position, (a, b) in enumerate(zip(full, pruned, strict=False)):
        if a != b:
            return position
    return None if len(full) == len(pruned) else min(len(full), len(pruned))


def median_interval(values: Sequence[float]) -> list[float] | None:
    """The 95 % interval of the median of what ``values`` are drawn from; None for fewer than six (see ``enough``).

    From the i-th smallest to the i-th largest value, with the largest i for which the median of the population lies
    outside with a chance of at most 5 %, ``2 · Σ_{j < i} C(n, j) / 2^n``. That is exact for any distribution, where
    resampling a handful of values gives intervals that are too narrow.
    """
    ordered, place = sorted(values), -1
    outside = 0.0
    while (outside := outside + comb(len(ordered), place + 1) / 2 ** len(ordered)) <= 0.025:
        place += 1
    return None if place < 0 else [ordered[place], ordered[-1 - place]]


def speed_up(full: Sequence[float], pruned: Sequence[float]) -> SpeedUp:
    """How many times as long the full model takes.

    Args:
        full, pruned: seconds, round by round; what drifts from round to round drops out of the ratios.

    Returns:
        The median of the rounds' ratios and its interval (``median_interval``).
    """
    ratios = [mine / theirs for mine, theirs in zip(full, pruned, strict=True)]
    return {"ratio": median(ratios), "interval": median_interval(ratios)}


def beyond_noise(found: SpeedUp) -> bool:
    """Whether a measured ratio shows a difference at all: its interval is known and does not hold 1."""
    interval = found["interval"]
    return interval is not None and not interval[0] <= 1 <= interval[1]
