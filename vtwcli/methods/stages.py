"""Update, read, leave: visual tokens are updated, then only read, then gone; a combination of VTW and ShortV.

The first layers build visual tokens. In the frozen layers, ``layers``, they are not updated, and serve as keys and
values only (ShortV, arXiv 2504.00502); at ``withdraw`` they leave (VTW, 2405.05803). Nothing is published for it, so it
has no defaults: ``vtw calibrate --method stages`` finds both borders together.

One sweep measures withdrawal at every layer and freezing of each layer alone. Of layers to withdraw at, the earliest
are tried from which on that costs at most 1/16, 1/4, 1, 4, .. times eta; of frozen layers, all from some layer on and
the n that cost least alone. Each pair is then run as a whole. From the cheapest that hold the frozen set grows: each
layer that is left is added to it by itself, and then the first, the first two, and so on, in the order of the harm that
this did; again and again until nothing more holds. So what decides is measured together, and no one range is needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from pydantic import Field, model_validator

from vtwcli.methods.method import Answers, Candidate, Grid, Method, Shape, Style, Trial
from vtwcli.methods.published import Layers, frozen
from vtwcli.schedule.intervention import Intervention
from vtwcli.schedule.schedule import Schedule, Withdraw
from vtwcli.schedule.short import spans

LEVELS = (1 / 16, 1 / 4, 1, 4, 16, 64, 256)  # times eta
SETS = 8  # of either kind of frozen layers, at most
LEADING = 3  # layers to withdraw at with which the frozen set grows


class Stages(Method):
    """Freeze visual tokens in some layers, withdraw them behind these."""

    key: ClassVar[str] = "stages"
    title: ClassVar[str] = "update, read, leave"
    paper: ClassVar[str | None] = "after 2405.05803 and 2504.00502"
    finds: ClassVar[str | None] = "the layers that it freezes and the withdrawal layer"
    searched: ClassVar[tuple[str, ...]] = ("layers", "withdraw")
    style: ClassVar[Style] = Style("#D55E00", "P", "update, read, leave")

    layers: Layers = Field(description="layers in which visual tokens are not updated")
    withdraw: int = Field(ge=1, description="layer at which they leave")

    @model_validator(mode="after")
    def _order(self) -> Stages:
        if self.layers and max(self.layers) >= self.withdraw:
            raise ValueError(f"layers: {max(self.layers)} is not in front of withdraw, {self.withdraw}")
        return self

    def schedule(self, **provenance: Any) -> Schedule:
        actions = (*frozen(self.layers), Withdraw(at=self.withdraw, action="withdraw"))
        return Schedule(actions=actions, provenance={"method": "stages", **provenance})

    def label(self) -> str:
        return _name(self.layers, self.withdraw)

    @classmethod
    def compared(cls, model: Shape, grid: Grid, base: Mapping[str, Any]) -> list[Candidate]:
        """Withdrawal at every eighth of the depth; frozen from a third and from half of the layers in front on."""
        step = max(1, model.depth // 8)
        pairs = [
            (range(start, k), k)
            for k in range(max(2, model.first_withdrawal), model.depth, step)
            for start in sorted({max(1, k // 3), k // 2})
        ]
        return _candidates(pairs)

    @classmethod
    def ask(cls, model: Shape) -> list[Intervention]:
        """Withdrawal at each layer, then freezing of each alone."""
        layers = range(model.depth)
        return [
            *(Intervention("withdraw", k) for k in layers),
            *(Intervention("freeze", d, d + 1) for d in layers),
        ]

    @classmethod
    def findings(cls, found: Answers) -> dict[str, Any]:
        """Of the mean over samples: KL of withdrawal at each layer, and of freezing each alone."""
        depth = len(found.kl) // 2
        return {"withdrawal": list(found.kl[:depth]), "contribution": list(found.kl[depth:])}

    @classmethod
    def candidates(cls, model: Shape, found: Answers, base: Mapping[str, Any]) -> list[Candidate]:
        """Every set of frozen layers with every layer to withdraw at, plain withdrawal among them."""
        depth = model.depth
        worst = [max(one) for one in zip(*found.by_task.values(), strict=True)]
        curve = worst if found.worst_task else found.kl
        least = _least(curve[depth:])
        leaves = _leaving(curve[:depth], found.eta, max(1, model.first_withdrawal))
        return _candidates((layers, k) for k in leaves for layers in _sets(least, k))

    @classmethod
    def before(cls, k: int, alone: Sequence[float]) -> list[Candidate]:
        """Withdrawal at ``k`` by itself, and behind frozen layers.

        Args:
            alone: KL of freezing each layer alone, [L] nats.
        """
        return _candidates((layers, k) for layers in _sets(_least(alone), k))

    @classmethod
    def further(cls, model: Shape, tried: Sequence[Trial]) -> list[Candidate]:
        """For the cheapest layers to withdraw at, the frozen layers that hold and more, in the order of harm; the
        cheapest of all with earlier withdrawal too."""
        held: dict[int, Trial] = {}
        for one in tried:
            k = one.candidate.parameters["withdraw"]
            if one.holds and (k not in held or one.cost < held[k].cost):
                held[k] = one
        leading: dict[int, set[int]] = {}
        for k in sorted(held, key=lambda k: held[k].cost):
            frozen = set(held[k].candidate.parameters["layers"])
            if len(leading) < LEADING and not any(_cut(frozen, e) == other for e, other in leading.items()):
                leading[k] = frozen
        pairs: list[tuple[Iterable[int], int]]
        pairs = [(layers, k) for k, frozen in leading.items() for layers in _grown(frozen, k, tried)]
        for k, frozen in list(leading.items())[:1]:
            first = max(1, model.first_withdrawal, 1 + _too_early(frozen, tried))
            pairs += [(frozen, e) for e in range(first, k)]
        known = {one.candidate.name for one in tried}
        return [one for one in _candidates(pairs) if one.name not in known]


def _least(alone: Sequence[float]) -> list[int]:
    """Layers by what freezing each alone costs, the least first; of equal ones the deeper."""
    return sorted(range(len(alone)), key=lambda layer: (alone[layer], -layer))


def _sets(least: Sequence[int], k: int) -> list[Sequence[int]]:
    """Frozen layers in front of ``k`` to begin with: none, all from some layer on, and the first of ``least``."""
    order = [layer for layer in least if layer < k]
    step = -(-k // SETS)
    return [range(start, k) for start in range(0, k + 1, step)] + [order[:n] for n in range(0, k, step)]


def _grown(frozen: set[int], k: int, tried: Iterable[Trial]) -> list[set[int]]:
    """The ``frozen`` layers with each of the others in front of ``k``, and with the first n of these by their harm.

    A layer that did not hold together with some of the frozen ones is left out. Its harm is what it did together with
    the most of them; where it was not tried so, it is added by itself only.
    """
    harm: dict[int, tuple[int, float]] = {}
    failed = set()
    for one in tried:
        layers = set(one.candidate.parameters["layers"])
        if one.candidate.parameters["withdraw"] == k and len(layers - frozen) == 1:
            [layer] = layers - frozen
            harm[layer] = min((-len(layers), one.harm), harm.get(layer, (0, 0.0)))
            failed |= set() if one.holds else {layer}
    rest = [layer for layer in range(k) if layer not in frozen | failed]
    order = sorted((layer for layer in rest if layer in harm), key=lambda layer: (harm[layer][1], -layer))
    return [frozen | {layer} for layer in rest] + [frozen | set(order[:n]) for n in range(2, len(order) + 1)]


def _too_early(frozen: set[int], tried: Iterable[Trial]) -> int:
    """The last layer at which withdrawal did not hold with some of the frozen ones; 0: none."""
    failed = [one.candidate.parameters for one in tried if not one.holds]
    return max((one["withdraw"] for one in failed if frozen.issuperset(one["layers"])), default=0)


def _cut(layers: Iterable[int], k: int) -> set[int]:
    """Those in front of ``k``."""
    return {layer for layer in layers if layer < k}


def _leaving(curve: Sequence[float], eta: float, least: int) -> list[int]:
    """The earliest layers, not before ``least``, from which on withdrawal stays under each level; the last always."""
    found = {len(curve) - 1}
    for level in LEVELS:
        k = len(curve)
        while k > least and curve[k - 1] <= level * eta:
            k -= 1
        found |= {k} - {len(curve)}
    return sorted(found)


def _candidates(pairs: Iterable[tuple[Iterable[int], int]]) -> list[Candidate]:
    """A candidate for each pair of frozen layers, cut to those in front, and layer to withdraw at; each once."""
    found = {}
    for layers, k in pairs:
        one = Stages(layers=sorted(_cut(layers, k)), withdraw=k)
        varied = {"layers": list(one.layers), "withdraw": k}
        found[one.label()] = Candidate(one.label(), "stages", one.schedule(), varied)
    return list(found.values())


def _name(layers: Iterable[int], withdraw: int) -> str:
    said = ",".join(str(at) if until == at + 1 else f"{at}-{until - 1}" for at, until in spans(layers))
    return f"frozen {said or 'none'}, K={withdraw}"
