"""VScan: a local and a global scan, the others merged into the kept (arXiv 2505.22654).

Half of the tokens come in equal shares from 4 x 4 windows of the image, by the class token's attention in an early
layer (5 of 24, scaled); half are the most attended in the layer before the last; every other token joins the most
similar kept one as a plain mean. At half of the language model's depth a third of them stays, ranked as PyramidDrop
does (the layer's own attention from the last row), and positions close up: 96, then 32 of 576 are 64 on average.
Where positions have several axes (Qwen, GLM-4V) they stay. Without a class token the mean attention that
a token receives takes the place of the class token's.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

from pydantic import Field

from vtwcli.methods.in_front import InFront, parameter, published
from vtwcli.methods.method import Shape, Style
from vtwcli.methods.published import layer_of
from vtwcli.schedule.schedule import Keep, Schedule, Select


class VScan(InFront):
    """Local and global scan, with merging."""

    key: ClassVar[str] = "vscan"
    title: ClassVar[str] = "VScan"
    paper: ClassVar[str | None] = "2505.22654"
    style: ClassVar[Style] = Style("#0072B2", "X", "VScan")
    score: ClassVar[str] = "tower_vscan"

    ratio: float | None = published(96)
    side: int = parameter("tower_vscan", "side", "windows along each side of the image")
    second: float = Field(1 / 3, gt=0, le=1, description="share of them that stays at the second cut; 1: all")
    layer: int = Field(16, ge=1, description="first layer behind the second cut; scaled to the depth")
    compact: bool = Field(True, description="whether rows behind what leaves there move up")

    def fitted(self, model: Shape) -> Self:
        given = self.model_fields_set
        layer = max(layer_of(16, model.depth), model.first_withdrawal, 1)
        changed: dict[str, Any] = {} if "layer" in given else {"layer": min(layer, model.depth - 1)}
        if "compact" not in given:
            changed["compact"] = not model.axes
        return self.model_copy(update=changed)

    def schedule(self, **provenance: Any) -> Schedule:
        first = super().schedule(**provenance)
        if self.second == 1:
            return first
        select = Select(score="attention", layer="here", ratio=self.second)
        positions = "compact" if self.compact else "original"
        keep = Keep(at=self.layer, action="keep", select=select, positions=positions)
        return Schedule(actions=(*first.actions, keep), provenance=first.provenance)

    @classmethod
    def at_share(cls, model: Shape, share: float) -> Self | None:
        """Both cuts in their published proportion."""
        if cls.refused(model) is not None:
            return None
        one = cls().fitted(model)
        first = share * model.depth / (one.layer + (model.depth - one.layer) * one.second)
        return cls(ratio=first).fitted(model) if first <= 1 else None
