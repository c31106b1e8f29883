"""Update, read, leave: visual tokens are updated, then only read, then gone; a combination of VTW and ShortV.

The first layers build visual tokens. In the frozen layers, ``layers``, they are not updated, and serve as keys and
values only (ShortV, arXiv 2504.00502); at ``withdraw`` they leave (VTW, 2405.05803). Nothing is published for it, so it
has no defaults: ``vtw calibrate --method stages`` finds both borders together.

One sweep measures withdrawal at every layer and freezing of each layer alone. Of layers to withdraw at, the earliest
are tried from which on that costs at most 1/16, 1/4, 1, 4, .. times eta; of frozen layers, all from some layer on and
the n that cost least alone. Each pair is then run as a whole: what decides is measured together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from pydantic import Field, model_validator

from vtwcli.methods.method import Answers, Candidate, Grid, Method, Shape, Style
from vtwcli.methods.published import Layers, frozen
from vtwcli.schedule.intervention import Intervention
from vtwcli.schedule.schedule import Schedule, Withdraw
from vtwcli.schedule.short import spans

LEVELS = (1 / 16, 1 / 4, 1, 4, 16, 64, 256)  # times eta
SETS = 16  # of either kind of frozen layers, at most


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
        step = -(-depth // SETS)
        least = sorted(range(depth), key=lambda layer: (curve[depth + layer], -layer))
        sets: list[Sequence[int]] = [range(start, depth) for start in range(0, depth + 1, step)]
        sets += [least[:n] for n in range(step, depth, step)]
        leaves = _leaving(curve[:depth], found.eta, max(1, model.first_withdrawal))
        return _candidates((layers, k) for k in leaves for layers in sets)


def _leaving(curve: Sequence[float], eta: float, least: int) -> list[int]:
    """The earliest layers, not before ``least``, from which on withdrawal stays under each level; the last always."""
    found = {len(curve) - 1}
    for level in LEVELS:
        k = len(curve)
        while k > least and curve[k - 1] <= level * eta:
            k -= 1
        found |= {k} - {len(curve)}
    return sorted(found)


def _candidates(pairs: Iterable[tuple[Sequence[int], int]]) -> list[Candidate]:
    """A candidate for each pair of frozen layers, cut to those in front, and layer to withdraw at; each once."""
    found = {}
    for layers, k in pairs:
        one = Stages(layers=sorted(layer for layer in layers if layer < k), withdraw=k)
        varied = {"layers": list(one.layers), "withdraw": k}
        found[one.label()] = Candidate(one.label(), "stages", one.schedule(), varied)
    return list(found.values())


def _name(layers: Iterable[int], withdraw: int) -> str:
    said = ",".join(str(at) if until == at + 1 else f"{at}-{until - 1}" for at, until in spans(layers))
    return f"frozen {said or 'none'}, K={withdraw}"
