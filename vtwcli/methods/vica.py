"""ViCA: visual tokens are only ever read, and in few layers (arXiv 2602.07574).

Visual rows stay what the projector made of them: frozen in all layers. Text reads them in the listed layers, and reads
text alone in the others. The published layers belong to models that were trained so; here the same is done to a model
that was not, which is another thing: look at the KL before anything else. Published are lists for 32 layers (7B), 40
(13B) and 24 (3B); other depths take the 7B list, where layer l of 32 is round(l L / 32) of fewer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from vtwcli.methods.method import Candidate, Grid, Method, Shape, Style
from vtwcli.methods.published import Layers, frozen, in_order, layer_of, scaled
from vtwcli.schedule.schedule import Mute, Schedule
from vtwcli.schedule.short import spans

PUBLISHED = {
    24: (0, 1, 14, 15, 18, 19, 21, 22, 23),
    32: (0, 1, 7, 8, 9, 10, 11, 14),
    40: (0, 6, 8, 9, 10, 13, 14, 16),
}  # by depth


class ViCA(Method):
    """Freeze all layers; text reads vision in the listed ones."""

    key: ClassVar[str] = "vica"
    title: ClassVar[str] = "ViCA"
    paper: ClassVar[str | None] = "2602.07574"
    style: ClassVar[Style] = Style("#CC79A7", "X", "ViCA's layers, untrained")

    layers: Layers = Field(
        PUBLISHED[32], description="layers in which text reads vision; by default the published ones"
    )
    depth: int = Field(32, ge=1, description="layers of the model; by default those of the model at hand")

    def fitted(self, model: Shape) -> ViCA:
        layers = self.layers if "layers" in self.model_fields_set else published(model.depth)
        return ViCA(layers=layers, depth=self.depth if "depth" in self.model_fields_set else model.depth)

    def schedule(self, **provenance: Any) -> Schedule:
        others = sorted(set(range(self.depth)) - set(self.layers))
        mutes = [Mute(at=at, until=until, action="mute") for at, until in spans(others)]
        actions = in_order([*frozen(range(self.depth)), *mutes])
        return Schedule(actions=actions, provenance={"method": "vica", **provenance})

    @classmethod
    def compared(cls, model: Shape, grid: Grid, base: Mapping[str, Any]) -> list[Candidate]:
        """The published layers."""
        one = cls().fitted(model)
        return [Candidate("vica", "vica", one.schedule(), {"layers": list(one.layers)})]


def published(depth: int) -> tuple[int, ...]:
    """The published layers for a model of this depth."""
    if depth in PUBLISHED:
        return PUBLISHED[depth]
    if depth < 32:
        return tuple(sorted({min(layer_of(layer, depth), depth - 1) for layer in PUBLISHED[32]}))
    return tuple(sorted(scaled(PUBLISHED[32], depth)))
