"""FitPrune: some visual tokens leave in every layer, by a recipe that keeps attention as it was (arXiv 2409.10197).

With M the attention of layer l, the largest weight of all heads, a visual token's score is the mean of M over the
visual rows times its sum over the text rows; behind the attention of layer l the d_l tokens with the smallest scores
leave. The published code takes their rows out before the attention's output projection, so that layer l's cache still
holds them; nothing reads these rows afterwards, so leaving at the entry of layer l + 1, as here, gives the same answers
and computes the rest of layer l for them.

Published are the numbers d_l of 576 tokens for 32 layers and four reductions. They are read as shares of the prompt's
visual tokens, and for another depth L what is left behind layer d is what is left behind round((d + 1) 32 / L) layers;
what would leave before a family allows it leaves as soon as it may.

``vtw calibrate --method fitprune`` makes recipes from your own samples, after the paper's idea: in each layer as many
tokens may leave as take no more than a share alpha of the attention to vision with them, of visual rows' and of text
rows', mean over samples of the full model; those that left stay away. Alpha is fitted by bisection to an average
number of visual tokens per layer; several averages are tried.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from vtwcli.methods.method import Answers, Candidate, Grid, Method, Shape, Style, fit_share
from vtwcli.schedule.schedule import Keep, Schedule, Select

# by reduction of FLOPs in per cent, layer by layer
PUBLISHED: dict[int, tuple[int, ...]] = {
    60: (14, 33, 89, 36, 36, 20, 55, 21, 18, 4, 7, 5, 2, 5, 7, 4, 26, 5, 11, 24, 4, 18, 2, 1, 0, 0, 1, 0, 1, 0, 0, 0),
    70: (48, 79, 118, 41, 33, 17, 36, 9, 9, 2, 3, 2, 1, 3, 4, 8, 18, 7, 8, 20, 4, 13, 2, 1, 0, 0, 1, 0, 1, 0, 0, 0),
    80: (128, 127, 118, 35, 26, 8, 13, 3, 2, 1, 0, 0, 0, 2, 1, 8, 7, 8, 5, 11, 2, 6, 1, 1, 0, 0, 0, 1, 0, 0, 0, 0),
    90: (262, 153, 80, 19, 13, 1, 2, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 2, 1, 2, 0, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0),
}  # fmt: skip
VISUAL = 576
AVERAGES = (0.9, 0.75, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)


class FitPrune(Method):
    """Keep ever fewer tokens, by what vision and text read; the defaults are the published recipe for 60 %."""

    key: ClassVar[str] = "fitprune"
    title: ClassVar[str] = "FitPrune"
    paper: ClassVar[str | None] = "2409.10197"
    finds: ClassVar[str | None] = "how many tokens leave in each layer"
    searched: ClassVar[tuple[str, ...]] = ("drops",)
    lost: ClassVar[bool] = True
    style: ClassVar[Style] = Style("#009E73", "p", "FitPrune")

    reduction: Literal[60, 70, 80, 90] = Field(
        60, description="the published recipe for so much less work, per cent"
    )
    drops: tuple[int, ...] | None = Field(
        None,
        description="how many tokens leave behind each layer's attention, in place of a published recipe",
    )
    visual: int = Field(
        VISUAL, ge=1, description="number of a prompt's visual tokens that the drops count from"
    )

    @model_validator(mode="after")
    def _room(self) -> FitPrune:
        if self.drops is not None and (min(self.drops, default=0) < 0 or sum(self.drops) > self.visual):
            raise ValueError(f"drops must not be negative, nor more than the {self.visual} tokens together")
        return self

    def fitted(self, model: Shape) -> FitPrune:
        if self.drops is not None:
            return self
        return FitPrune(drops=at_depth(PUBLISHED[self.reduction], model))

    def schedule(self, **provenance: Any) -> Schedule:
        drops = PUBLISHED[self.reduction] if self.drops is None else self.drops
        left = [self.visual - gone for gone in accumulate(drops)]
        return recipe([share / self.visual for share in left], **provenance)

    @classmethod
    def compared(cls, model: Shape, grid: Grid, base: Mapping[str, Any]) -> list[Candidate]:
        """The four published recipes."""
        made = []
        for reduction in PUBLISHED:
            one = cls(reduction=reduction).fitted(model).schedule()
            made.append(Candidate(f"fitprune {reduction}%", "fitprune", one, {"reduction": reduction}))
        return made

    @classmethod
    def at_share(cls, model: Shape, share: float) -> FitPrune | None:
        """Between the two published recipes around the share, in proportion; that for 90 % is the least."""
        recipes = [PUBLISHED[reduction] for reduction in sorted(PUBLISHED, reverse=True)]
        recipes.append((0,) * len(recipes[0]))

        def between(x: float) -> FitPrune:
            place = x * (len(recipes) - 1)
            at = min(int(place), len(recipes) - 2)
            two = zip(recipes[at], recipes[at + 1], strict=True)
            drops = [round(one + (other - one) * (place - at)) for one, other in two]
            return cls(drops=at_depth(drops, model))

        return fit_share(between, model, share)

    @classmethod
    def candidates(cls, model: Shape, found: Answers, base: Mapping[str, Any]) -> list[Candidate]:
        """A recipe for each average."""
        made = {}
        for average in AVERAGES:
            counts = [round(VISUAL * share) for share in fit(found.lost, average, model.first_withdrawal)]
            drops = [before - behind for before, behind in pairwise([VISUAL, *counts])]
            schedule = cls(drops=drops).schedule()
            made[tuple(drops)] = Candidate(f"fitprune {average:.0%}", "fitprune", schedule, {"drops": drops})
        return list(made.values())


def at_depth(drops: Sequence[int], model: Shape) -> list[int]:
    """A recipe for 32 layers, read for a model's depth."""
    left = [VISUAL - gone for gone in accumulate(drops)]
    mine = [VISUAL, *(left[max(round((d + 1) * 32 / model.depth), 1) - 1] for d in range(model.depth))]
    mine[: model.first_withdrawal] = [VISUAL] * model.first_withdrawal  # they leave as soon as they may
    return [before - behind for before, behind in pairwise(mine)]


def fit(lost: Sequence[Sequence[float]], average: float, first_withdrawal: int = 0) -> list[float]:
    """Shares of the prompt's visual tokens left behind each layer's attention, which come to an average.

    Args:
        lost: see ``Answers``, [L][101].
        average: of the share that enters each layer; approached from below as closely as the steps allow.
        first_withdrawal: all are there before this layer.
    """

    def left(alpha: float) -> list[float]:
        shares, now = [], 1.0
        for layer, curve in enumerate(lost):
            if layer + 1 >= first_withdrawal:
                gone = max(step for step, share in enumerate(curve) if share <= alpha)
                now = min(now, 1 - gone / (len(curve) - 1))
            shares.append(now)
        return shares

    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        if sum([1.0, *left(middle)[:-1]]) / len(lost) > average:
            low = middle
        else:
            high = middle
    return left(high)


def recipe(left: Sequence[float], **provenance: Any) -> Schedule:
    """The schedule that leaves these shares of the prompt's visual tokens behind each layer's attention.

    Args:
        left: of each layer, 0..1; what they are behind the last layer does not matter.
    """
    actions, before = [], 1.0
    for layer, share in enumerate(left[:-1]):
        if share < before:
            select = Select(score="self_cross", share=share)
            actions.append(Keep(at=layer + 1, action="keep", select=select))
            before = share
    return Schedule(actions=tuple(actions), provenance={"method": "fitprune", **provenance})
