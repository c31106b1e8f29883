"""The common part of methods that choose visual tokens in front of the language model, image by image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from pydantic import Field, model_validator

from vtwcli.methods.method import Candidate, Grid, Method, Shape
from vtwcli.schedule import rules
from vtwcli.schedule.schedule import Keep, Schedule, Select


def published(count: int) -> Any:
    """The field of a share that is published as a count of 576 tokens."""
    words = f"share of each image's tokens that stay, rounded up; published as {count} of 576"
    return Field(count / 576, gt=0, le=1, description=words)


def found(description: str) -> Any:
    """The field of a share in place of the number that a rule finds itself."""
    return Field(None, gt=0, le=1, description=description)


def parameter(score: str, name: str, description: str) -> Any:
    """The field of a score's parameter, with the default and the bounds that schedules give it."""
    key = rules.KEYS[score][name]
    return Field(key.default, ge=key.least, le=key.most, description=description)


class InFront(Method):
    """Keep some of each image's tokens by a score of the vision tower; the language model gets a shorter prompt.

    The published numbers are of LLaVA-1.5's 576 tokens an image; as a share of an image's tokens they go with every
    model. What stays is numbered as in a shorter prompt, but under positions with axes for rows and columns of the
    image (Qwen, GLM-4V), where it keeps its place.

    Fields that a method adds under the names of its score's parameters are those.

    Class attributes:
        score: the schedule's word.
        class_token: whether the tower must have one.
    """

    score: ClassVar[str]
    class_token: ClassVar[bool] = False

    ratio: float | None = Field(
        1 / 9, gt=0, le=1, description="share of each image's tokens that stay, rounded up"
    )
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
        found = True if ratio is None and self.count is None else None
        select = Select(score=self.score, ratio=ratio, count=self.count, found=found, parameters=parameters)
        keep = Keep(at=0, action="keep", select=select)
        return Schedule(actions=(keep,), provenance={"method": self.key, **provenance})

    def parameters(self) -> dict[str, Any]:
        """Those of the score that differ from its own defaults."""
        own = rules.KEYS.get(self.score, {})
        given = self.model_dump(include=set(own))
        return {name: value for name, value in given.items() if value != own[name].default}

    @classmethod
    def refused(cls, model: Shape) -> str | None:
        if model.tower is None:
            return "the vision tower of this family has no scores"
        if cls.class_token and model.tower != "class token":
            return "the vision tower has no class token"
        return None

    @classmethod
    def compared(cls, model: Shape, grid: Grid, base: Mapping[str, Any]) -> list[Candidate]:
        """Every ratio of the grid and what the rule finds; nothing where the method does not go with the model."""
        if cls.refused(model) is not None:
            return []
        made = []
        if cls.model_fields["ratio"].default is None:
            made.append(Candidate(cls.key, cls.key, cls().fitted(model).schedule(), {}))
        for ratio in grid.ratios:
            one = cls(ratio=ratio).fitted(model)
            made.append(Candidate(f"{cls.key} {ratio:.0%}", cls.key, one.schedule(), {"ratio": ratio}))
        return made

    @classmethod
    def at_share(cls, model: Shape, share: float) -> Self | None:
        """The share itself: every layer holds it."""
        return cls(ratio=share).fitted(model) if cls.refused(model) is None else None
