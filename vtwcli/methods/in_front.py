"""What methods share that choose an image's tokens in front of the language model, by a score of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from pydantic import Field, model_validator

from vtwcli.methods.method import Candidate, Grid, Method, Shape
from vtwcli.schedule import rules
from vtwcli.schedule.schedule import Keep, Schedule, Select


def published(count: int) -> Any:
    """The field of the share that is published as a count of 576 tokens."""
    words = f"share of an image's visual tokens that stay, rounded up; published as {count} of 576"
    return Field(count / 576, gt=0, le=1, description=words)


def parameter(score: str, name: str, description: str) -> Any:
    """The field of a score's parameter, with the default and the bounds that schedules give it."""
    key = rules.KEYS[score][name]
    return Field(key.default, ge=key.least, le=key.most, description=description)


class InFront(Method):
    """Keeps tokens of each image before the first layer, by the score ``tower_`` and the method's key.

    Fields that subclasses add are parameters of the score.
    """

    ratio: float | None = Field(
        None, gt=0, le=1, description="share of an image's visual tokens that stay, rounded up"
    )
    count: int | None = Field(
        None, ge=0, description="number of an image's visual tokens that stay, in place of a ratio"
    )

    @model_validator(mode="after")
    def _one_amount(self) -> Self:
        if self.count is not None and "ratio" in self.model_fields_set:
            raise ValueError("give one of ratio and count")
        return self

    def schedule(self, **provenance: Any) -> Schedule:
        ratio = self.ratio if self.count is None else None
        select = Select(
            score=f"tower_{self.key}",
            ratio=ratio,
            count=self.count,
            found=True if (ratio, self.count) == (None, None) else None,
            parameters=self.model_dump(exclude=set(InFront.model_fields), exclude_defaults=True) or None,
        )
        keep = Keep(at=0, action="keep", select=select)
        return Schedule(actions=(keep,), provenance={"method": self.key, **provenance})

    @classmethod
    def compared(cls, model: Shape, grid: Grid, base: Mapping[str, Any]) -> list[Candidate]:
        """Every ratio of the grid, and first what the rule finds itself, where it does."""
        varied: list[dict[str, Any]] = [{"ratio": ratio} for ratio in grid.ratios]
        names = [f"{cls.key} {ratio:.0%}" for ratio in grid.ratios]
        if cls.model_fields["ratio"].default is None:
            varied, names = [{}, *varied], [cls.key, *names]
        return [
            Candidate(name, cls.key, cls(**one).schedule(), one)
            for name, one in zip(names, varied, strict=True)
        ]
