"""Successive halving: how many candidates on how many samples, and which of them go on.

Axes: C candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import numpy as np
from numpy.typing import NDArray

FINALISTS = 12
"""About as many come through; they are what a choice is made from."""
CLASSES = 8
"""Of cost; in each the better half goes on."""
FEWEST = 3
"""Samples of each task, where there are as many, on which anything is judged."""


def rungs(trials: int, samples: int, finalists: int = FINALISTS) -> list[int]:
    """On how many samples of each task candidates have been tried behind each rung, ascending; the last is all.

    Behind every rung half of the candidates go on, to twice as many samples.
    """
    halvings = 0
    while trials > finalists << halvings:
        halvings += 1
    counts = [
        max(min(FEWEST, samples), ceil(samples / 2 ** (halvings - rung))) for rung in range(halvings + 1)
    ]
    return sorted(set(counts))


def classes(cost: Sequence[float] | NDArray[np.float64], count: int = CLASSES) -> list[int]:
    """Each candidate's class of cost, 0 the cheapest: equal parts of the span between the least and the largest."""
    values = np.asarray(cost, dtype=np.float64)
    low, high = float(values.min()), float(values.max())
    if high <= low:
        return [0] * len(values)
    return [min(int((value - low) / (high - low) * count), count - 1) for value in values]


def better_half(
    cost: Sequence[float] | NDArray[np.float64], far: Sequence[float] | NDArray[np.float64], least: int = 1
) -> list[int]:
    """Places of the candidates that go on, ascending: of each class of cost the better half, rounded up.

    Args:
        cost: of each, [C].
        far: how far each is from the full model, [C]; of equally far ones the cheaper is better, then the earlier.
        least: so many go on wherever there are as many.
    """
    order = sorted(range(len(cost)), key=lambda place: (far[place], cost[place], place))
    if len(order) <= least:
        return sorted(order)
    found: list[int] = []
    of = classes(cost)
    for one in sorted(set(of)):
        mine = [place for place in order if of[place] == one]
        found += mine[: ceil(len(mine) / 2)]
    others = [place for place in order if place not in set(found)]
    return sorted(found + others[: max(0, least - len(found))])


def spread(cost: Sequence[float], count: int) -> list[int]:
    """Places of ``count`` candidates out of all classes of cost alike, the earlier first within each; ascending.

    The dearest class comes first.
    """
    of = classes(cost) if len(cost) else []
    queues = [
        [place for place, mine in enumerate(of) if mine == one] for one in sorted(set(of), reverse=True)
    ]
    found: list[int] = []
    while queues and len(found) < count:
        for queue in queues:
            if len(found) < count:
                found.append(queue.pop(0))
        queues = [queue for queue in queues if queue]
    return sorted(found)
