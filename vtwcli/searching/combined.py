"""Combinations that no method publishes: visual tokens that leave at one or two layers, are frozen, and withdrawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from vtwcli.methods.method import Candidate
from vtwcli.methods.published import frozen
from vtwcli.schedule.schedule import Action, Freeze, Keep, Schedule, Select, Withdraw
from vtwcli.schedule.short import spans

METHOD = "combination"
"""What documents call the method of a schedule that only a search makes."""
RATIOS = (0.75, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05)


@dataclass(frozen=True)
class Kept:
    """A part of the visual tokens goes on.

    Attributes:
        layer: from which on.
        score: of those that do.
        ratio: share of those that were there, rounded up.
    """

    layer: int
    score: str
    ratio: float


@dataclass(frozen=True)
class Combination:
    """Subsets, frozen layers, and a withdrawal.

    Attributes:
        depth: number of the model's layers L.
        kept: subsets in the order of their layers, all in front of the withdrawal.
        frozen: layers in front of the withdrawal in which visual tokens are not updated, ascending.
        withdraw: the layer at which all leave; L: never.
    """

    depth: int
    kept: tuple[Kept, ...] = ()
    frozen: tuple[int, ...] = ()
    withdraw: int = 0

    @classmethod
    def of(cls, schedule: Schedule, depth: int) -> Combination | None:
        """The combination that is this schedule; None where it is none."""
        kept, still, withdraw = [], set[int](), depth
        for action in schedule.actions:
            if isinstance(action, Withdraw) and isinstance(action.at, int):
                withdraw = action.at
            elif isinstance(action, Freeze):
                still |= set(range(action.at, action.until))
            elif isinstance(action, Keep) and isinstance(action.at, int) and action.select.ratio is not None:
                kept.append(Kept(action.at, action.select.score, action.select.ratio))
            else:
                return None
        found = cls(depth, tuple(kept), tuple(sorted(still)), withdraw)
        return found if found.schedule().plain() == schedule.plain() else None

    def schedule(self) -> Schedule:
        """What the runtime executes."""
        actions: list[Action] = [
            *(
                Keep(at=one.layer, action="keep", select=Select(score=one.score, ratio=one.ratio))
                for one in self.kept
            ),
            *frozen(self.frozen),
        ]
        actions.sort(key=lambda action: action.at if isinstance(action.at, int) else 0)
        if self.withdraw < self.depth:
            actions.append(Withdraw(at=self.withdraw, action="withdraw"))
        return Schedule(actions=tuple(actions))

    def candidate(self) -> Candidate:
        """As one of those that are compared."""
        kept = [vars(one) for one in self.kept]
        varied = {"keep": kept, "frozen": list(self.frozen), "withdraw": self.withdraw}
        if self.withdraw == self.depth:
            del varied["withdraw"]
        return Candidate(self.name, METHOD, self.schedule(), varied)

    @property
    def name(self) -> str:
        """For tables and plots."""
        words = [f"{one.score} {one.ratio:.0%} at {one.layer}" for one in self.kept]
        if self.frozen:
            said = (str(at) if until == at + 1 else f"{at}-{until - 1}" for at, until in spans(self.frozen))
            words.append(f"frozen {','.join(said)}")
        if self.withdraw < self.depth:
            words.append(f"K={self.withdraw}")
        return ", ".join(words)

    def cut(self) -> Combination:
        """Without what lies behind the withdrawal, and with one subset a layer."""
        kept = {one.layer: one for one in sorted(self.kept, key=lambda one: one.layer)}
        ahead = tuple(one for one in kept.values() if one.layer < self.withdraw)
        still = tuple(sorted({layer for layer in self.frozen if layer < self.withdraw}))
        return replace(self, kept=ahead, frozen=still)


@dataclass(frozen=True)
class Space:
    """What combinations are made of.

    Attributes:
        depth: number of the model's layers L.
        least: the first layer at which visual tokens may leave.
        scores: by which subsets may be chosen.
        least_lost: all layers, those first that change least where they alone are frozen.
    """

    depth: int
    least: int
    scores: tuple[str, ...]
    least_lost: tuple[int, ...]

    def draw(self, random: np.random.Generator) -> Combination:
        """Any of them: none, one or two subsets, no or some frozen layers, a withdrawal or none."""
        withdraw = int(random.integers(self.least, self.depth + 1))
        layers = range(self.least, withdraw)
        count = min(len(layers), int(random.choice((0, 1, 1, 2)))) if self.scores else 0
        at = sorted(random.choice(layers, count, replace=False).tolist()) if count else []
        kept = tuple(Kept(int(layer), self._score(random), float(random.choice(RATIOS))) for layer in at)
        still: Sequence[int] = ()
        kind = random.integers(4)
        if withdraw and kind:
            start = int(random.integers(withdraw))
            still = range(start, withdraw) if kind < 3 else self._first(withdraw, withdraw - start)
        return Combination(self.depth, kept, tuple(sorted(still)), withdraw).cut()

    def near(self, one: Combination, random: np.random.Generator) -> Combination:
        """A neighbour: one or two of its parts a little otherwise."""
        for _ in range(int(random.integers(1, 3))):
            one = self._moved(one, random)
        return one.cut()

    def _moved(self, one: Combination, random: np.random.Generator) -> Combination:
        step = int(random.choice((-1, 1)))
        kind = random.choice(("withdraw", "frozen", "frozen", "start", "layer", "score", "ratio", "keep"))
        if kind == "withdraw":
            withdraw = min(max(one.withdraw + step, self.least), self.depth)
            grown = set(one.frozen)
            if one.withdraw - 1 in grown:  # what is frozen up to the withdrawal stays so
                grown |= set(range(one.withdraw, withdraw))
            return replace(one, withdraw=withdraw, frozen=tuple(sorted(grown)))
        if kind == "frozen" and one.withdraw:
            ahead = self._first(one.withdraw, one.withdraw)
            free = [layer for layer in ahead if layer not in one.frozen]
            still = [layer for layer in ahead if layer in one.frozen]
            if step > 0 and free:  # the harmless ones first, most of the time
                return replace(
                    one, frozen=(*one.frozen, free[min(len(free) - 1, int(random.geometric(0.6)) - 1)])
                )
            gone = still[-min(len(still), int(random.geometric(0.6)))] if still else None
            return replace(one, frozen=tuple(layer for layer in one.frozen if layer != gone))
        if kind == "start" and one.frozen:
            first = one.frozen[0]
            moved = one.frozen[1:] if step > 0 else (max(first - 1, 0), *one.frozen)
            return replace(one, frozen=moved)
        if kind == "keep" and self.scores and one.withdraw > self.least and (step > 0 or not one.kept):
            if len(one.kept) == 2:
                return replace(one, kept=one.kept[:1])
            layer = int(random.integers(self.least, one.withdraw))
            new = Kept(layer, self._score(random), float(random.choice(RATIOS)))
            return replace(one, kept=(*one.kept, new))
        if not one.kept:
            return one
        place = int(random.integers(len(one.kept)))
        changed = self._changed(one.kept[place], str(kind), step, random)
        others = (*one.kept[:place], *one.kept[place + 1 :])
        return replace(one, kept=others if changed is None else (*others, changed))

    def _changed(self, one: Kept, kind: str, step: int, random: np.random.Generator) -> Kept | None:
        if kind == "layer":
            return replace(one, layer=max(self.least, one.layer + step))
        if kind == "score":
            return replace(one, score=self._score(random))
        if kind == "ratio":
            nearest = min(range(len(RATIOS)), key=lambda place: abs(RATIOS[place] - one.ratio))
            return replace(one, ratio=RATIOS[min(max(nearest + step, 0), len(RATIOS) - 1)])
        return None

    def _score(self, random: np.random.Generator) -> str:
        return str(random.choice(self.scores))

    def _first(self, withdraw: int, count: int) -> list[int]:
        """Of the layers in front of a withdrawal so many that change least."""
        return [layer for layer in self.least_lost if layer < withdraw][:count]
