"""ShortV: in most layers visual tokens need no update (arXiv 2504.00502).

In the chosen layers visual rows leave as they entered; text still reads the keys and values made of them, and the
cache stays whole. The contribution of a layer is LC(l) = KL(p_l || p_full) at the prompt's last row, where p_l is the
model's distribution with layer l alone frozen: the frozen run comes first, as in the published code. The n layers with
the smallest mean over samples are frozen together; each was measured alone. ``vtw calibrate --method shortv`` does so
on your samples and tries every n. The last layer's contribution is 0, since nobody reads what it makes of visual rows.

Published are 19 of 32 layers (LLaVA-1.5-7B) and 24 of 40 (13B), the least first. Other depths take the 7B list: a
layer is frozen where the published layer at its middle is. The paper's contribution of text rows is not in its code,
and not here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from vtwcli.methods.method import Answers, Candidate, Grid, Method, Shape, Style
from vtwcli.methods.published import Layers, frozen, scaled
from vtwcli.schedule.intervention import Intervention
from vtwcli.schedule.schedule import Schedule

PUBLISHED = {
    32: (31, 29, 30, 28, 0, 26, 27, 25, 24, 22, 23, 21, 2, 3, 20, 18, 17, 12, 19),
    40: (39, 32, 28, 36, 27, 37, 29, 30, 1, 38, 25, 31, 2, 26, 23, 34, 0, 33, 35, 22, 24, 21, 20, 17),
}  # by depth, the least contribution first


class ShortV(Method):
    """Freeze the layers that do least for visual tokens."""

    key: ClassVar[str] = "shortv"
    title: ClassVar[str] = "ShortV"
    paper: ClassVar[str | None] = "2504.00502"
    finds: ClassVar[str | None] = "the layers that it freezes"
    searched: ClassVar[tuple[str, ...]] = ("layers",)
    at_prompt: ClassVar[bool] = True
    style: ClassVar[Style] = Style("#56B4E9", "*", "ShortV")

    layers: Layers = Field(
        PUBLISHED[32],
        description="layers in which visual tokens are not updated; by default the published ones",
    )

    def fitted(self, model: Shape) -> ShortV:
        return self if "layers" in self.model_fields_set else ShortV(layers=published(model.depth))

    def schedule(self, **provenance: Any) -> Schedule:
        return Schedule(actions=tuple(frozen(self.layers)), provenance={"method": "shortv", **provenance})

    @classmethod
    def compared(cls, model: Shape, grid: Grid, base: Mapping[str, Any]) -> list[Candidate]:
        """The published layers, and the first third and two thirds of them."""
        layers = published(model.depth)
        return [_candidate(layers[:n]) for n in sorted({len(layers) * part // 3 for part in (1, 2, 3)})]

    @classmethod
    def ask(cls, model: Shape) -> list[Intervention]:
        return [Intervention("freeze", layer, layer + 1) for layer in range(model.depth)]

    @classmethod
    def findings(cls, found: Answers) -> dict[str, Any]:
        return {"contribution": list(found.kl), "order": order(found)}

    @classmethod
    def candidates(cls, model: Shape, found: Answers, base: Mapping[str, Any]) -> list[Candidate]:
        """Every number of layers, the least first."""
        least = order(found)
        return [_candidate(least[:n]) for n in range(1, model.depth + 1)]


def published(depth: int) -> tuple[int, ...]:
    """The published layers for a model of this depth, the least contribution first."""
    return PUBLISHED[depth] if depth in PUBLISHED else scaled(PUBLISHED[32], depth)


def order(found: Answers) -> list[int]:
    """Layers by their contribution, the least first; of equal ones the deeper."""
    return sorted(range(len(found.kl)), key=lambda layer: (found.kl[layer], -layer))


def _candidate(layers: Any) -> Candidate:
    layers = tuple(layers)
    return Candidate(
        f"shortv N={len(layers)}", "shortv", ShortV(layers=layers).schedule(), {"layers": list(layers)}
    )
