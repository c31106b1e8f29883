"""Rules that choose the withdrawal layer K from KL curves, and how certain the choice is.

Notation: KL[s, k] is sample s's KL(P_pruned ‖ P_full) in nats for withdrawal at layer k, averaged over the compared
positions; m_k its mean over samples; eta the threshold; candidates are the layers k_min..L-1.

==============  =====================================================================================
policy          K
==============  =====================================================================================
``paper``       min {k : m_k <= eta} (VTW, arXiv 2405.05803)
``sustained``   min {k : m_j <= eta for all j >= k}; the paper's rule does not look beyond k
``quantile``    min {k : Q_q(KL[:, j]) <= eta for all j >= k}, Q_q the q-quantile over samples
``agreement``   min {k : a_j >= p for all j >= k}, a_j the mean top-1 agreement with the full model
``worst-task``  max over tasks of ``sustained`` on the task's own samples
``budget``      argmin {m_k : cost(k) <= b}, cost in FLOPs or KV entries relative to the full model
``guarantee``   the earliest layer whose loss on unseen inputs can be promised to be small; ``judge.guarantee``
==============  =====================================================================================

Each gives None when no candidate qualifies. ``guarantee`` looks at each sample's loss, not at curves, so it is not
chosen here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from vtwcli.judge.flops import DEFAULT_CONVENTION
from vtwcli.judge.statistics import enough
from vtwcli.recipe.recipe import CalibrateSection, Policy
from vtwcli.results.document import Relative

Curves = NDArray[np.float64]
OF_CURVES: tuple[Policy, ...] = tuple(name for name in get_args(Policy) if name != "guarantee")
"""The policies of ``choose``."""


@dataclass(frozen=True)
class Rule:
    """A policy with its parameters.

    Attributes:
        policy: one of the names above.
        eta: threshold in nats.
        min_layer: first candidate k_min.
        quantile: q of ``quantile``.
        agreement: p of ``agreement``.
        budget: b of ``budget``.
        cost: cost of withdrawal at each layer relative to the full model, [L]; read by ``budget`` only.
    """

    policy: Policy
    eta: float
    min_layer: int
    quantile: float = 0.95
    agreement: float = 0.98
    budget: float = 1.0
    cost: tuple[float, ...] = ()


def rule_of(
    options: CalibrateSection, least: int, cost: Sequence[Relative], policy: Policy | None = None
) -> Rule:
    """The rule of a calibration, or another policy with what its options say.

    Args:
        least: the first candidate.
        cost: of withdrawal at each layer.
    """
    kv = options.budget_of == "kv"
    relative = [one["kv_ratio"] if kv else one["flops_ratio"][DEFAULT_CONVENTION] for one in cost]
    return Rule(
        policy or options.policy,
        options.eta,
        least,
        options.quantile,
        options.agreement,
        options.budget,
        tuple(relative),
    )


def choose(rule: Rule, kl: Curves, agree: Curves, tasks: Sequence[str]) -> int | None:
    """K by ``rule``.

    Args:
        kl: [samples, L] nats.
        agree: [samples, L] share of compared positions whose top-1 token is the full model's.
        tasks: the task of each sample.

    Raises:
        ValueError: the policy is not one of ``OF_CURVES``.
    """
    if rule.policy not in OF_CURVES:
        raise ValueError(f"policy {rule.policy!r} does not choose by curves")
    mean = kl.mean(axis=0)
    if rule.policy == "paper":
        return _first(mean <= rule.eta, rule.min_layer)
    if rule.policy == "sustained":
        return _first_sustained(mean <= rule.eta, rule.min_layer)
    if rule.policy == "quantile":
        return _first_sustained(np.quantile(kl, rule.quantile, axis=0) <= rule.eta, rule.min_layer)
    if rule.policy == "agreement":
        return _first_sustained(agree.mean(axis=0) >= rule.agreement, rule.min_layer)
    if rule.policy == "worst-task":
        layers = per_task(rule, kl, tasks).values()
        return None if None in layers else max(k for k in layers if k is not None)
    affordable = np.asarray(rule.cost) <= rule.budget
    affordable[: rule.min_layer] = False
    return int(np.where(affordable, mean, np.inf).argmin()) if affordable.any() else None


def per_task(rule: Rule, kl: Curves, tasks: Sequence[str]) -> dict[str, int | None]:
    """The ``sustained`` layer of each task on its own samples, in order of appearance."""
    names = np.asarray(tasks)
    return {
        task: _first_sustained(kl[names == task].mean(axis=0) <= rule.eta, rule.min_layer)
        for task in dict.fromkeys(tasks)
    }


def bootstrap(
    rule: Rule, kl: Curves, agree: Curves, tasks: Sequence[str], resamples: int, seed: int
) -> tuple[int, int] | None:
    """The 2.5 % and 97.5 % quantiles of K over resampled samples, drawn with replacement within each task.

    A resample in which no layer qualifies counts as L. None when ``resamples`` is 0, or where there are too few
    samples for an interval (``enough``); the policy ``worst-task`` needs them in each task. None of a guarantee, which
    says by itself how sure it is.
    """
    if resamples == 0 or rule.policy not in OF_CURVES or not enough(tasks, each=rule.policy == "worst-task"):
        return None
    generator = np.random.default_rng(seed)
    names = np.asarray(tasks)
    groups = [np.flatnonzero(names == task) for task in dict.fromkeys(tasks)]
    found = []
    for _ in range(resamples):
        rows = np.concatenate([generator.choice(group, size=len(group)) for group in groups])
        k = choose(rule, kl[rows], agree[rows], [tasks[row] for row in rows])
        found.append(kl.shape[1] if k is None else k)
    low, high = np.quantile(found, (0.025, 0.975), method="nearest")
    return int(low), int(high)


def compromise(rule: Rule, kl: Curves, tasks: Sequence[str]) -> int:
    """The candidate to name when none qualifies: the smallest worst-task mean KL."""
    names = np.asarray(tasks)
    worst = np.max([kl[names == task].mean(axis=0) for task in dict.fromkeys(tasks)], axis=0)
    return int(rule.min_layer + worst[rule.min_layer :].argmin())


def default_min_layer(layers: int) -> int:
    """The published search starts at layer 5; shallow models start at 1."""
    return 5 if layers >= 16 else 1


def _first(holds: NDArray[np.bool_], start: int) -> int | None:
    found = np.flatnonzero(holds[start:])
    return int(start + found[0]) if len(found) else None


def _first_sustained(holds: NDArray[np.bool_], start: int) -> int | None:
    failures = np.flatnonzero(~holds[start:])
    first = start + (int(failures[-1]) + 1 if len(failures) else 0)
    return first if first < len(holds) else None
