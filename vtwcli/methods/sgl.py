"""SGL: a smaller model answers first, and what it read of the image is what the large one keeps (arXiv 2412.03324).

The guide answers greedily. A visual token's score is the attention that it receives in all layers and heads of the
guide, summed over the rows of text in its prompt and over the rows of its answer; the large model keeps the best, in
their places and with their positions, from layer int(0.4 L) on. The published script keeps 0.4 of them there. The guide
answers at most as many tokens as the command asks for. Its own cost is not counted, and the early exit, by which the
guide's answer is taken where it is sure, is not in it: here the large model always answers.

Both models must make the same visual tokens of an image. An exported directory holds one model, so there is no export.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from vtwcli.methods.method import Candidate, Grid, Method, Shape, Style, share_behind
from vtwcli.schedule.schedule import Keep, Schedule, Select

_SHARE = 0.4  # of the layers, in front of the cut; and of the tokens, behind it


class SGL(Method):
    """Keep what a second, smaller model attends to while it answers."""

    key: ClassVar[str] = "sgl"
    title: ClassVar[str] = "SGL"
    paper: ClassVar[str | None] = "2412.03324"
    guided: ClassVar[bool] = True
    style: ClassVar[Style] = Style("#000000", "*", "SGL")

    guide: str | None = Field(
        None, min_length=1, description="the model that answers first, a name or directory"
    )
    layer: int = Field(int(_SHARE * 32), ge=0, description="the first layer with the chosen tokens only")
    ratio: float = Field(_SHARE, gt=0, le=1, description="share of visual tokens that stay, rounded up")

    def fitted(self, model: Shape) -> SGL:
        if "layer" in self.model_fields_set:
            return self
        return self.model_copy(update={"layer": _behind(_SHARE, model)})

    def schedule(self, **provenance: Any) -> Schedule:
        parameters = None if self.guide is None else {"guide": self.guide}
        select = Select(score="guided", ratio=self.ratio, parameters=parameters)
        keep = Keep(at=self.layer, action="keep", select=select)
        return Schedule(actions=(keep,), provenance={"method": "sgl", **provenance})

    @classmethod
    def compared(cls, model: Shape, grid: Grid, base: Mapping[str, Any]) -> list[Candidate]:
        """The published layer with every ratio of the grid, where there is a guide."""
        if base.get("guide") is None:
            return []
        made = []
        for ratio in grid.ratios:
            method = cls(guide=base["guide"], layer=_behind(_SHARE, model), ratio=ratio)
            made.append(Candidate(f"sgl {ratio:.0%}", "sgl", method.schedule(), method.model_dump()))
        return made

    @classmethod
    def at_share(cls, model: Shape, share: float) -> SGL | None:
        """As published, where the share of layers in front is that of the tokens behind; the guide is to be added."""
        at = _behind(1 - (1 - share) ** 0.5, model)
        ratio = share_behind(share, at, model.depth, model.depth)
        return None if ratio is None else cls(layer=at, ratio=ratio)


def _behind(share: float, model: Shape) -> int:
    """The layer behind a share of them, or the first that the family allows."""
    return max(int(share * model.depth), model.first_withdrawal)
