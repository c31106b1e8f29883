"""Subsets kept at one layer: by what the last row reads, and the controls that every method must beat."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from vtwcli.methods.method import Candidate, Grid, Method, Shape, Style, early, share_behind
from vtwcli.schedule.schedule import Action, Keep, Schedule, Select, Withdraw


class Subset(Method):
    """Keep a share of the visual tokens from one layer on, by one score."""

    layer: int = Field(2, ge=1, description="layer at which the subset is chosen")
    ratio: float = Field(0.5, gt=0, lt=1, description="share of visual tokens that stay, rounded up")

    def keep(self) -> Keep:
        """The action that chooses the subset."""
        return _keep(self.layer, self.key, self.ratio)

    def schedule(self, **provenance: Any) -> Schedule:
        return Schedule(actions=(self.keep(),), provenance=provenance)

    @classmethod
    def compared(cls, model: Shape, grid: Grid, base: Mapping[str, Any]) -> list[Candidate]:
        found = []
        for ratio in grid.ratios:
            varied = {"layer": grid.keep_layer, "ratio": ratio}
            one = cls.of([*varied.items(), ("seed", grid.seed)])
            found.append(Candidate(f"{cls.key} {ratio:.0%}", cls.key, one.schedule(), varied))
        return found

    @classmethod
    def at_share(cls, model: Shape, share: float) -> Method | None:
        at = early(model)
        ratio = share_behind(share, at, model.depth, model.depth)
        return None if ratio is None or ratio == 1 else cls(layer=at, ratio=ratio)


class Attention(Subset):
    """The tokens that the last row attends to most (FastV, arXiv 2403.06764)."""

    key: ClassVar[str] = "attention"
    title: ClassVar[str] = "keep by attention"
    style: ClassVar[Style] = Style("#009E73", "^", "keep by attention")


class Contribution(Subset):
    """The tokens with the largest norm of contribution to the last row's attention output."""

    key: ClassVar[str] = "contribution"
    title: ClassVar[str] = "keep by contribution"
    style: ClassVar[Style] = Style("#CC79A7", "v", "keep by contribution")


class Random(Subset):
    """A control: as many tokens, drawn by the seed."""

    key: ClassVar[str] = "random"
    title: ClassVar[str] = "random"
    style: ClassVar[Style] = Style("#6B6B6B", "x", "random (control)")

    seed: int = Field(0, ge=0, description="of the draw")

    def keep(self) -> Keep:
        return _keep(self.layer, "random", self.ratio, self.seed)


class Uniform(Subset):
    """A control: every n-th token."""

    key: ClassVar[str] = "uniform"
    title: ClassVar[str] = "uniform"
    style: ClassVar[Style] = Style("#6B6B6B", "+", "uniform (control)")


class TwoStep(Subset):
    """``attention`` first, then withdrawal; compared at half and three quarters of the depth."""

    key: ClassVar[str] = "two-step"
    title: ClassVar[str] = "keep by attention, then withdrawal"
    style: ClassVar[Style] = Style("#E69F00", "D", "keep by attention, then withdrawal")

    withdraw: int = Field(..., ge=1, description="layer at which the rest leaves")

    def schedule(self, **provenance: Any) -> Schedule:
        actions: tuple[Action, ...] = (
            _keep(self.layer, "attention", self.ratio),
            Withdraw(at=self.withdraw, action="withdraw"),
        )
        return Schedule(actions=actions, provenance=provenance)

    @classmethod
    def compared(cls, model: Shape, grid: Grid, base: Mapping[str, Any]) -> list[Candidate]:
        at, found = grid.keep_layer, []
        for ratio in grid.ratios:
            for k in sorted({model.depth // 2, model.depth * 3 // 4} - set(range(at + 1))):
                varied: dict[str, Any] = {"layer": at, "ratio": ratio, "withdraw": k}
                one = cls(**varied)
                found.append(Candidate(f"attention {ratio:.0%}, K={k}", "two-step", one.schedule(), varied))
        return found

    @classmethod
    def at_share(cls, model: Shape, share: float) -> Method | None:
        """What is kept leaves at half of the depth, or later where that is too early for the share."""
        at, depth = early(model), model.depth
        for k in range(max(depth // 2, at + 1), depth):
            ratio = share_behind(share, at, k, depth)
            if ratio is not None and ratio < 1:
                return cls(layer=at, ratio=ratio, withdraw=k)
        return None


def _keep(at: int, score: Any, ratio: float, seed: int = 0) -> Keep:
    return Keep(at=at, action="keep", select=Select(score=score, ratio=ratio, seed=seed))
