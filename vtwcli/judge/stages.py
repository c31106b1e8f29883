"""From curves to stages and schedules: pure functions on numbers.

Shallow layers do not need to read vision yet, deep layers do not need it any more, the middle is between (VisiPruner,
arXiv 2510.17205). Layers are 0-based; S samples, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vtwcli.judge.policies import Rule, per_task
from vtwcli.schedule.schedule import Mute, Schedule, Withdraw

Curves = NDArray[np.float64]


@dataclass(frozen=True)
class Stages:
    """Where the stages begin.

    Attributes:
        blind: the first layer such that blocking text's reading of vision in all layers up to and with it costs
            more than eta; L if none does.
        deep: the withdrawal layer, the first from which on withdrawal stays at or under eta; None if there is none.
        layers: L.
    """

    blind: int
    deep: int | None
    layers: int

    @property
    def shallow(self) -> range:
        """Layers whose reading of vision is not needed: those before ``blind`` that are not deep."""
        return range(min(self.blind, self.end))

    @property
    def middle(self) -> range:
        """Layers between."""
        return range(len(self.shallow), self.end)

    @property
    def last(self) -> range:
        """The deep layers."""
        return range(self.end, self.layers)

    @property
    def end(self) -> int:
        """The first layer that is no longer shallow or middle."""
        return self.layers if self.deep is None else self.deep


def boundaries(
    until: Curves, withdrawal: Curves, tasks: Sequence[str], eta: float, min_layer: int
) -> tuple[Stages, dict[str, Stages]]:
    """The stages of all samples together, and of each task by itself.

    Each rule must hold for every task's mean: the shallow stage is the shortest of the tasks', the deep one begins
    at the latest of the tasks' withdrawal layers.

    Args:
        until: KL when text does not read vision in layers 0..d, [S, L] nats.
        withdrawal: KL when visual tokens are withdrawn at d, [S, L] nats.
        tasks: the task of each sample.
        eta: threshold in nats.
        min_layer: first candidate for the withdrawal layer.
    """
    layers = until.shape[1]
    names = np.asarray(tasks)
    deep = per_task(Rule("sustained", eta, min_layer), withdrawal, tasks)
    found = {}
    for task in dict.fromkeys(tasks):
        costly = np.flatnonzero(until[names == task].mean(axis=0) > eta)
        found[task] = Stages(int(costly[0]) if len(costly) else layers, deep[task], layers)
    ends = [one.deep for one in found.values()]
    latest = None if None in ends else max(k for k in ends if k is not None)
    return Stages(min(one.blind for one in found.values()), latest, layers), found


def static_schedule(stages: Stages, provenance: Mapping[str, Any]) -> Schedule:
    """Text does not read vision in the shallow layers, and from the deep stage on there is none.

    Each of the two was measured by itself; ``vtw eval`` judges them together.
    """
    actions: list[Any] = []
    if stages.shallow:
        actions.append(Mute(at=0, until=len(stages.shallow), action="mute"))
    if stages.last:
        actions.append(Withdraw(at=stages.end, action="withdraw"))
    return Schedule(actions=tuple(actions), provenance=dict(provenance))


def sentences(
    stages: Stages,
    until: Sequence[float],
    alone: Sequence[float],
    withdrawal: Sequence[float],
    critical: Sequence[float],
    eta: float,
) -> dict[str, str]:
    """What each stage means, one sentence each, from the mean curves.

    Args:
        until, withdrawal: as for ``boundaries``, [L].
        alone: KL when text does not read vision in one layer alone, [L].
        critical: number of critical tokens, [L].
    """
    words = {}
    if stages.shallow:
        cost = until[len(stages.shallow) - 1]
        words["shallow"] = f"{span(stages.shallow)}: blocking text's reading of vision costs {cost:.2g} nats"
    else:
        words["shallow"] = f"none: blocking text's reading of vision in layer 0 costs {until[0]:.2g} nats"
    if stages.middle:
        worst = max(stages.middle, key=lambda d: alone[d])
        words["middle"] = (
            f"{span(stages.middle)}: vision is read here; blocking one layer alone costs at most "
            f"{alone[worst]:.2g} nats (layer {worst}), and {np.mean([critical[d] for d in stages.middle]):.1f} "
            "visual tokens are critical on average"
        )
    else:
        words["middle"] = "none: the shallow stage reaches the deep one"
    if stages.deep is None:
        words["deep"] = f"none: withdrawal at no layer stays at or under {eta:g} nats for every task"
    else:
        words["deep"] = (
            f"{span(stages.last)}: withdrawing visual tokens costs {withdrawal[stages.deep]:.2g} nats"
        )
    return words


def span(layers: range) -> str:
    """A range of layers in words."""
    return f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]}-{layers[-1]}"
