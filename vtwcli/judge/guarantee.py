"""What a choice may cost on inputs that it has not seen: promises by testing in a fixed order.

A sample's loss lies in [0, 1]; the risk R of a candidate is its mean over the population that the samples are drawn
from. A promise says R <= alpha, and is wrong with a chance of at most delta = 1 - confidence over the draw of the
samples, whatever the model and the population (Learn then Test, arXiv 2110.01052; risk-controlling prediction sets,
2101.02703). The candidates stand in an order that these samples had no part in, the safest first. For each in turn the
hypothesis R > alpha is tested at level delta; the last one that is rejected before the first that is not is chosen.
Since testing ends there, there is no correction for the number of candidates. Of several tasks every one's hypothesis
must be rejected, each at delta: the chance to reject all of them is no greater than that of the worst one, so there is
no correction for tasks either.

With n samples, r their mean loss and h(a, b) = a ln(a/b) + (1-a) ln((1-a)/(1-b)) the p-values are

===================  ===========================================================================
losses of 0 and 1    P[Bin(n, alpha) <= n r], exact
any in [0, 1]        min(exp(-n h(min(r, alpha), alpha)), e P[Bin(n, alpha) <= ceil(n r)])
                     (Hoeffding and Bentkus)
===================  ===========================================================================

Both are (1 - alpha)^n where nothing is lost at all, which is how many samples it takes at least.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, e, exp, fsum, lgamma, log, log1p

import numpy as np
from numpy.typing import NDArray

from vtwcli.results.guarantee import Tested

Losses = NDArray[np.float64]


@dataclass(frozen=True)
class Promise:
    """What is to be promised.

    Attributes:
        risk: alpha, the largest mean loss of each task.
        confidence: 1 - delta.
        binary: whether losses can be 0 and 1 only. That follows from what the loss is, never from the samples.
    """

    risk: float
    confidence: float
    binary: bool = False

    @property
    def delta(self) -> float:
        """The chance of a wrong promise."""
        return 1 - self.confidence

    @property
    def needed(self) -> int:
        """The least number of samples of a task with which it can be given, if none of them loses anything."""
        least = ceil(log(self.delta) / log1p(-self.risk))
        return least + (_tail(0, least, self.risk) > self.delta)

    def p_value(self, losses: Sequence[float] | Losses) -> float:
        """How likely losses as small as these are at most, if the risk were greater than is to be promised."""
        return _p_value(fsum(losses), len(losses), self.risk, self.binary)

    def bound(self, losses: Sequence[float] | Losses) -> float:
        """The smallest risk that could be promised of these losses with this confidence; 1 where there are none."""
        if not len(losses):
            return 1.0
        total, count = fsum(losses), len(losses)
        low, high = total / count, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            if _p_value(total, count, middle, self.binary) <= self.delta:
                high = middle
            else:
                low = middle
        return high


def walk(count: int, losses: Callable[[int], Losses], tasks: Sequence[str], promise: Promise) -> list[Tested]:
    """Test candidates 0, 1, .. in this order, and end with the first for which the promise cannot be given.

    Args:
        count: number of candidates.
        losses: a candidate's loss of each sample, [S]; asked for only where the candidate is tested.
        tasks: the task of each sample.

    Returns:
        What came of each that was tested; all but perhaps the last hold.
    """
    names = np.asarray(tasks)
    found: list[Tested] = []
    for candidate in range(count):
        lost = losses(candidate)
        mine = {task: lost[names == task] for task in dict.fromkeys(tasks)}
        p = {task: promise.p_value(one) for task, one in mine.items()}
        holds = all(value <= promise.delta for value in p.values())
        mean = {task: fsum(one) / len(one) for task, one in mine.items()}
        found.append({"loss": mean, "p_value": p, "holds": holds})
        if not holds:
            break
    return found


def chosen(tested: Sequence[Tested]) -> int | None:
    """Place of the last candidate that holds; None where not even the first does."""
    return sum(one["holds"] for one in tested) - 1 if tested and tested[0]["holds"] else None


def _p_value(total: float, count: int, risk: float, binary: bool) -> float:
    if not count or risk >= 1:
        return 0.0 if count else 1.0
    tail = _tail(ceil(total), count, risk)
    if binary:
        return tail
    mean = min(total / count, risk)
    return min(exp(-count * _divergence(mean, risk)), e * tail, 1.0)


def _divergence(a: float, b: float) -> float:
    """h(a, b) of two coins, nats; a < 1."""
    return (a * log(a / b) if a else 0.0) + (1 - a) * (log1p(-a) - log1p(-b))


def _tail(successes: int, count: int, chance: float) -> float:
    """P[Bin(count, chance) <= successes]."""
    return float(_tails(count, chance)[min(successes, count)]) if count else 1.0


@lru_cache(maxsize=64)
def _tails(count: int, chance: float) -> NDArray[np.float64]:
    """P[Bin(count, chance) <= k] for k = 0..count; summed from the small end, by logarithms of each term."""
    k = np.arange(count + 1)
    factorials = np.array([lgamma(i + 1) for i in range(count + 1)])
    terms = factorials[-1] - factorials - factorials[::-1] + k * log(chance) + (count - k) * log1p(-chance)
    return np.minimum(np.cumsum(np.exp(terms)), 1.0)
