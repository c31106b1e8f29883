"""FastV: behind the second layer half of the visual tokens can go (arXiv 2403.06764).

Before layer K the visual tokens are ranked by the attention that the last row of the prompt paid them in layer K-1,
mean over heads; the best stay, in their places and with their positions. The paper averages the attention over all
rows; the published code takes the last one, and so does this. The paper's R is the share that leaves.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field, model_validator

from vtwcli.methods.method import Candidate, Grid, Method, Shape, Style, early, share_behind
from vtwcli.schedule.schedule import Keep, Schedule, Select


class FastV(Method):
    """Keep what the last row attends to, once; the defaults are the paper's."""

    key: ClassVar[str] = "fastv"
    title: ClassVar[str] = "FastV"
    paper: ClassVar[str | None] = "2403.06764"
    style: ClassVar[Style] = Style("#56B4E9", "P", "FastV")

    layer: int = Field(2, ge=1, description="K: the first layer with the chosen tokens only")
    ratio: float = Field(0.5, gt=0, le=1, description="share of visual tokens that stay, rounded up")
    count: int | None = Field(
        None, ge=0, description="number of visual tokens that stay, in place of a ratio"
    )

    @model_validator(mode="after")
    def _one_amount(self) -> FastV:
        if self.count is not None and "ratio" in self.model_fields_set:
            raise ValueError("give one of ratio and count")
        return self

    def schedule(self, **provenance: Any) -> Schedule:
        ratio = self.ratio if self.count is None else None
        select = Select(score="attention", ratio=ratio, count=self.count)
        keep = Keep(at=self.layer, action="keep", select=select)
        return Schedule(actions=(keep,), provenance={"method": "fastv", **provenance})

    @classmethod
    def compared(cls, model: Shape, grid: Grid, base: Mapping[str, Any]) -> list[Candidate]:
        """The published layer, or the first that the family allows, with every ratio of the grid."""
        at = max(2, model.first_withdrawal)
        made = []
        for ratio in grid.ratios:
            schedule = cls(layer=at, ratio=ratio).schedule()
            made.append(Candidate(f"fastv {ratio:.0%}", "fastv", schedule, {"layer": at, "ratio": ratio}))
        return made

    @classmethod
    def at_share(cls, model: Shape, share: float) -> FastV | None:
        """The published layer, scaled to the depth, and the ratio that the share takes."""
        at = early(model)
        ratio = share_behind(share, at, model.depth, model.depth)
        return None if ratio is None else cls(layer=at, ratio=ratio)
