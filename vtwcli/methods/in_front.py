"""The common part of methods that choose visual tokens in front of the language model, image by image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from pydantic import Field, model_validator

from vtwcli.methods.method import Candidate, Grid, Method, Shape
from vtwcli.schedule.schedule import Keep, Schedule, Select


class InFront(Method):
    """Keep some of each image's tokens by a score of the vision tower; the language model gets a shorter prompt.

    The published numbers are of LLaVA-1.5's 576 tokens an image; as a share of an image's tokens they go with every
    model. What stays is numbered as in a shorter prompt, but under positions with axes for rows and columns of the
    image (Qwen, GLM-4V), where it keeps its place.

    Class attributes:
        score: the schedule's word.
        class_token: whether the tower must have one.
    """

    score: ClassVar[str]
    class_token: ClassVar[bool] = False

    ratio: float = Field(1 / 9, gt=0, le=1, description="share of each image's tokens that stay, rounded up")
    count: int | None = Field(
        None, ge=1, description="number of each image's tokens that stay, in place of a ratio"
    )

    @model_validator(mode="after")
    def _one_amount(self) -> Self:
        if self.count is not None and "ratio" in self.model_fields_set:
            raise ValueError("give one of ratio and count")
        return self

    def schedule(self, **provenance: Any) -> Schedule:
        ratio = self.ratio if self.count is None else None
        parameters = self.parameters() or None
        select = Select(score=self.score, ratio=ratio, count=self.count, parameters=parameters)
        keep = Keep(at=0, action="keep", select=select)
        return Schedule(actions=(keep,), provenance={"method": self.key, **provenance})

    def parameters(self) -> dict[str, Any]:
        """Those of the score that differ from its own defaults."""
        return {}

    @classmethod
    def refused(cls, model: Shape) -> str | None:
        if model.tower is None:
            return "the vision tower of this family has no scores"
        if cls.class_token and model.tower != "class token":
            return "the vision tower has no class token"
        return None

    @classmethod
    def compared(cls, model: Shape, grid: Grid, base: Mapping[str, Any]) -> list[Candidate]:
        """Every ratio of the grid; nothing where the method does not go with the model."""
        made = []
        for ratio in grid.ratios if cls.refused(model) is None else ():
            one = cls(ratio=ratio).fitted(model)
            made.append(Candidate(f"{cls.key} {ratio:.0%}", cls.key, one.schedule(), {"ratio": ratio}))
        return made
