"""Methods that keep fewer visual tokens in stages: what they have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Self

from pydantic import BeforeValidator, Field, model_validator

from vtwcli.methods.method import Candidate, Grid, Method, Shape, fit_share
from vtwcli.methods.published import layer_of
from vtwcli.schedule.schedule import Keep, Schedule

PUBLISHED_VISUAL = 576


def _listed(value: Any) -> Any:
    """A number or a text like ``8, 16`` as a list."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",")]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else value


_Least1 = Annotated[int, Field(ge=1)]
_Count = Annotated[int, Field(ge=0)]
_Share = Annotated[float, Field(ge=0, le=1)]
Layers = Annotated[tuple[_Least1, ...], BeforeValidator(_listed), Field(min_length=1)]
Counts = Annotated[tuple[_Count, ...], BeforeValidator(_listed), Field(min_length=1)]
Shares = Annotated[tuple[_Share, ...], BeforeValidator(_listed), Field(min_length=1)]


class Staged(Method):
    """Keep the best visual tokens at one layer after the other; a stage is one ``keep``.

    Class attributes:
        least: the first layer at which a stage may begin.
        compact: whether positions close up behind what leaves.
    """

    layers: Layers = Field(..., description="first layer of each stage, with the chosen tokens only")
    ratios: Shares = Field(
        ...,
        description="share of the prompt's visual tokens that stays at each, rounded down; one number: at all",
    )
    counts: Counts | None = Field(
        None, description="numbers of visual tokens that stay, in place of ratios; one number: at all stages"
    )
    least: ClassVar[int] = 1
    compact: ClassVar[bool] = False

    @classmethod
    def refused(cls, model: Shape) -> str | None:
        if cls.compact and model.axes:
            return "positions of this model have several axes, and no rule says how they close up"
        return None

    @model_validator(mode="after")
    def _one_amount_a_stage(self) -> Staged:
        if self.counts is not None and "ratios" in self.model_fields_set:
            raise ValueError("give one of ratios and counts")
        name, given = ("ratios", self.shares()) if self.counts is None else ("counts", self.counts)
        if len(given) not in (1, len(self.layers)):
            raise ValueError(f"{len(self.layers)} layers and {len(given)} {name}; give one for each layer")
        if list(self.layers) != sorted(set(self.layers)):
            raise ValueError(f"layers {list(self.layers)} must rise")
        return self

    def shares(self) -> tuple[float, ...]:
        """The ratios that count where no counts are given."""
        return self.ratios

    def amounts(self) -> list[dict[str, Any]]:
        """How many stay at each stage, as ``select`` says it."""
        name, given = ("share", self.shares()) if self.counts is None else ("count", self.counts)
        return [{name: one} for one in (given * len(self.layers) if len(given) == 1 else given)]

    def stage(self, number: int, at: int, amount: Mapping[str, Any]) -> Keep:
        """The action of a stage, counted from 0."""
        raise NotImplementedError

    def schedule(self, **provenance: Any) -> Schedule:
        stages = enumerate(zip(self.layers, self.amounts(), strict=True))
        actions = tuple(self.stage(number, at, amount) for number, (at, amount) in stages)
        return Schedule(actions=actions, provenance={"method": self.key, **provenance})

    def fitted(self, model: Shape) -> Self:
        """Layers that were not given, scaled to the model's depth; stages that fall together are the later one."""
        if "layers" in self.model_fields_set:
            return self
        least = max(self.least, model.first_withdrawal)
        layers = [max(layer_of(at, model.depth), least) for at in self.layers]
        name, given = ("ratios", self.shares()) if self.counts is None else ("counts", self.counts)
        amounts = given * len(layers) if len(given) == 1 else given
        stages = {at: amount for at, amount in zip(layers, amounts, strict=True) if at < model.depth}
        others = {
            key: getattr(self, key)
            for key in self.model_fields_set - {"layers", "ratios", "counts", "tokens"}
        }
        return type(self)(**{**others, "layers": tuple(stages), name: tuple(stages.values())})

    @classmethod
    def compared(cls, model: Shape, grid: Grid, base: Mapping[str, Any]) -> list[Candidate]:
        """The published stages, and the same with every ratio of the grid at the first and the others in proportion."""
        if model.first_withdrawal >= model.depth or cls.refused(model):
            return []
        published = cls.of(()).fitted(model)
        found = [Candidate(cls.key, cls.key, published.schedule(), published.model_dump(mode="json"))]
        for ratio in grid.ratios:
            ratios = scaled(published.ratios, ratio)
            one = cls(layers=published.layers, ratios=ratios)
            varied = {"layers": list(one.layers), "ratios": list(ratios)}
            found.append(Candidate(f"{cls.key} {ratio:.0%}", cls.key, one.schedule(), varied))
        return found

    @classmethod
    def at_share(cls, model: Shape, share: float) -> Self | None:
        """The published stages with shares in the published proportions, none above all there are."""
        if model.first_withdrawal >= model.depth or cls.refused(model):
            return None
        published = cls.of(()).fitted(model)
        layers, ratios = published.layers, published.ratios
        most = ratios[0] / ratios[-1] if ratios[-1] else 1.0  # then even the last stage keeps all
        return fit_share(lambda x: cls(layers=layers, ratios=scaled(ratios, x * most)), model, share)


def scaled(ratios: Sequence[float], first: float) -> tuple[float, ...]:
    """Ratios in the same proportions that begin with ``first``."""
    whole = ratios[0] or 1.0
    return tuple(round(min(1.0, one * first / whole), 6) for one in ratios)
