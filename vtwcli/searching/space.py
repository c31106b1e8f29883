"""What a search tries: schedules of the methods, and combinations that no method publishes, within its goals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vtwcli.errors import UsageError
from vtwcli.judge.flops import TextShape, prefill_cost
from vtwcli.methods import METHODS
from vtwcli.methods.in_front import InFront
from vtwcli.methods.method import Candidate, Grid, Shape
from vtwcli.models.families import Family
from vtwcli.recipe.recipe import ScheduleSection
from vtwcli.runtime import PruningError
from vtwcli.schedule import rules, words
from vtwcli.schedule.schedule import Keep, Schedule, Select
from vtwcli.searching.combined import RATIOS, Combination, Space
from vtwcli.searching.halving import spread
from vtwcli.sweep.schedules import plan_of, why_not

SHARES = (0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
"""Of visual tokens in a layer, on average: methods that can be set so are tried so."""
THRESHOLDS = (0.05, 0.1, 0.2, 0.4, 0.8)
_TRIES = 40  # combinations that are drawn for each that is wanted


@dataclass(frozen=True)
class Costs:
    """What a schedule costs before it is run, of a prompt with mean numbers of tokens; shares of the full model's.

    Attributes:
        shape: sizes of the text model.
        text, visual: tokens.
        bound: largest shares by name, ``flops`` and ``kv``.
    """

    shape: TextShape
    text: int
    visual: int
    bound: Mapping[str, float]

    def of(self, schedule: Schedule) -> dict[str, float] | None:
        """Its FLOPs and its KV cache; None where they depend on the sample."""
        if not schedule.is_static:
            return None
        depth = self.shape.layers
        visual = schedule.visual_per_layer(depth, self.visual)
        still = [n * frozen for n, frozen in zip(visual, schedule.frozen_layers(depth), strict=True)]
        tokens, whole = [self.text + n for n in visual], [self.text + self.visual] * depth
        flops = prefill_cost(self.shape, tokens, frozen_per_layer=still) / prefill_cost(self.shape, whole)
        return {"flops": flops, "kv": sum(tokens) / sum(whole)}

    def main(self, schedule: Schedule) -> float:
        """The cost by which classes are made: of the KV cache where that alone is bounded; 1 where it is not known."""
        found = self.of(schedule)
        return 1.0 if found is None else found["kv" if set(self.bound) == {"kv"} else "flops"]

    def within(self, schedule: Schedule) -> bool:
        """Whether a schedule may lie within the bounds."""
        found = self.of(schedule)
        return found is None or all(found[name] <= most + 1e-9 for name, most in self.bound.items())


@dataclass(frozen=True)
class Known:
    """Which schedules a model can run, and how.

    Attributes:
        family: the model's.
        layers: its decoder layers.
        masks: whether one pass over the layers serves many schedules; else the runtime runs each.
        streamed: whether layers are streamed, so that there is no runtime.
    """

    family: Family
    layers: Sequence[Any]
    masks: bool
    streamed: bool

    def together(self, schedule: Schedule) -> str | None:
        """Why one pass does not know a schedule, or nobody can run it; None where it does.

        Raises:
            UsageError: nobody can run it.
        """
        try:
            plan = plan_of(schedule, len(self.layers), self.family)
        except PruningError as error:
            raise UsageError(str(error)) from None
        reason = why_not(plan, self.layers) if self.masks or self.streamed else None
        return None if reason is None else reason[0]


@dataclass(frozen=True)
class Methods:
    """The schedules of methods.

    Attributes:
        together: those that one pass knows.
        alone: those that the runtime runs one by one.
        left_out: methods none of which can be tried, by the reason.
    """

    together: list[Candidate]
    alone: list[Candidate]
    left_out: dict[str, list[str]]


def of_methods(names: Sequence[str], model: Shape, known: Known, rule: ScheduleSection, seed: int) -> Methods:
    """What methods are compared at, more finely than ``vtw budget`` compares, and at equal shares of tokens.

    Args:
        names: of the methods.
        rule: VisiPruner's parameters that are not varied, and the guide of methods that need one.
    """
    at = max(1, model.first_withdrawal)
    layers = sorted(
        {min(max(layer, at), model.depth - 1) for layer in (at, 2, model.depth // 4, model.depth // 2)}
    )
    together: dict[str, Candidate] = {}
    alone: dict[str, Candidate] = {}
    left_out: dict[str, list[str]] = {}
    for name in METHODS:
        if name not in names:
            continue
        method = METHODS[name]
        base: dict[str, Any] = {"guide": rule.guide} if method.guided else rule.rule()
        tried: list[Candidate] = []
        for layer in layers:
            grid = Grid(RATIOS, layer, THRESHOLDS, seed)
            tried += [_placed(one, layer) for one in method.compared(model, grid, base)]
        for share in SHARES if not method.guided else ():
            found = method.at_share(model, share)
            if found is not None:
                parameters = found.model_dump(mode="json", exclude_none=True)
                tried.append(Candidate(f"{name} {share:.0%} of tokens", name, found.schedule(), parameters))
        blind = known.streamed and issubclass(method, InFront)
        why = "scores of the vision tower need the whole model when layers are streamed" if blind else None
        why = (
            why
            or method.refused(model)
            or ("it needs a second model" if method.guided and not tried else None)
        )
        some = False
        for one in tried:
            try:
                reason = known.together(one.schedule)
            except UsageError as error:
                why = error.message
                continue
            if reason is not None and known.streamed:
                why = f"{reason} when layers are streamed"
                continue
            some = True
            (together if reason is None else alone).setdefault(_key(one.schedule), one)
        if not some:
            left_out.setdefault(why or "it names no schedule for this model", []).append(name)
    taken = set(together)
    mine = list(together.values())
    named = _named(mine + [one for key, one in alone.items() if key not in taken])
    return Methods(named[: len(mine)], named[len(mine) :], left_out)


def space_of(model: Shape, known: Known, least_lost: Sequence[int]) -> Space:
    """What combinations of a model are made of: scores that one pass knows and that choose alike in every run."""
    least = max(1, model.first_withdrawal)
    scores = []
    for score in words.words("score"):
        if score in ("random", "guided") or score.startswith("tower_") or rules.KEYS.get(score):
            continue
        one = Schedule(actions=(Keep(at=least, action="keep", select=Select(score=score, ratio=0.5)),))
        try:
            if known.together(one) is None:
                scores.append(score)
        except UsageError:
            continue
    return Space(model.depth, least, tuple(scores), tuple(least_lost))


def drawn(
    space: Space, costs: Costs, count: int, random: np.random.Generator, taken: set[str]
) -> list[Candidate]:
    """So many combinations within the bounds, of all classes of cost alike; those ``taken`` not again."""
    pool: dict[str, Combination] = {}
    for _ in range(_TRIES * count):
        one = space.draw(random)
        key = _key(one.schedule())
        if key not in taken and key not in pool and costs.within(one.schedule()):
            pool[key] = one
    return _spread(pool, costs, count, taken)


def neighbours(
    of: Sequence[Candidate],
    space: Space,
    costs: Costs,
    count: int,
    random: np.random.Generator,
    taken: set[str],
) -> list[Candidate]:
    """So many combinations close to good ones; those ``taken`` not again."""
    parents = [one for c in of if (one := Combination.of(c.schedule, space.depth)) is not None]
    pool: dict[str, Combination] = {}
    for _ in range(_TRIES * count if parents else 0):
        if len(pool) >= 2 * count:
            break
        one = space.near(parents[int(random.integers(len(parents)))], random)
        key = _key(one.schedule())
        if one.schedule().actions and key not in taken and key not in pool and costs.within(one.schedule()):
            pool[key] = one
    return _spread(pool, costs, count, taken)


def _spread(pool: Mapping[str, Combination], costs: Costs, count: int, taken: set[str]) -> list[Candidate]:
    found = list(pool.values())
    chosen = spread([costs.main(one.schedule()) for one in found], count)
    taken |= {_key(found[place].schedule()) for place in chosen}
    return [found[place].candidate() for place in chosen]


def taken_by(candidates: Sequence[Candidate]) -> set[str]:
    """What combinations must not be again."""
    return {_key(one.schedule) for one in candidates}


def _key(schedule: Schedule) -> str:
    return str(schedule.plain())


def _placed(one: Candidate, layer: int) -> Candidate:
    """A candidate of a grid, with the layer in its name where that is varied."""
    if one.parameters.get("layer") != layer or f"K={layer}" == one.name:
        return one
    return Candidate(f"{one.name} (layer {layer})", one.method, one.schedule, one.parameters)


def _named(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Candidates whose names differ."""
    seen: dict[str, int] = {}
    found = []
    for one in candidates:
        seen[one.name] = seen.get(one.name, 0) + 1
        name = one.name if seen[one.name] == 1 else f"{one.name} ({seen[one.name]})"
        found.append(Candidate(name, one.method, one.schedule, one.parameters))
    return found
