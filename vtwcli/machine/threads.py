"""How many threads torch computes with: one where layers are too small to be worth sharing.

Threads that share a layer of a small model meet every few microseconds and spin while they wait. On idle cores that
gains nothing; where another program holds one of the cores, all of them wait for it at every step.
"""

from __future__ import annotations

import os

SMALL = 1 << 18
"""Weights of a decoder layer up to which one thread computes; a layer of width 128 has about 2e5."""

_GIVEN = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


class settings:
    """What the command line sets.

    Attributes:
        by_size: whether ``fit`` may change torch's threads; a library's caller keeps his.
    """

    by_size = False


def fit(weights: int) -> str | None:
    """Let one thread compute a model on the CPU whose decoder layers have at most ``SMALL`` weights each.

    Never against what the user says (``OMP_NUM_THREADS``, ``MKL_NUM_THREADS``).

    Returns:
        What was done, in a sentence; None: nothing.
    """
    import torch

    before = torch.get_num_threads()
    if not settings.by_size or weights > SMALL or before == 1 or any(os.environ.get(name) for name in _GIVEN):
        return None
    torch.set_num_threads(1)
    return (
        f"one thread instead of {before}: a layer has {weights} weights, too few to share; OMP_NUM_THREADS sets "
        "another number"
    )
