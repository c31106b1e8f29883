"""The search itself: from many schedules on few samples to few on many."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import numpy as np

from vtwcli.errors import GateError
from vtwcli.measure.candidates import flops_of
from vtwcli.measure.study import Study
from vtwcli.methods.method import Candidate
from vtwcli.recipe.search import SearchSection
from vtwcli.results.comparison import TriedRow
from vtwcli.results.search import Rung
from vtwcli.searching import space
from vtwcli.searching.combined import Combination
from vtwcli.searching.halving import FINALISTS, better_half, classes, rungs, spread
from vtwcli.searching.parts import Parts
from vtwcli.searching.trials import Measured, Trials

RUNTIME = 16
"""Schedules that only the runtime can run, one by one; they join near the end."""
GENERATIONS = 5
"""Of neighbours of what is best so far."""
_HOPELESS = 4  # times as far from the full model as the goal allows


class Hunt:
    """The search itself.

    Attributes:
        finalists: what came through, measured on the part that chooses.
        rungs: what was measured on how many samples.
        stopped: whether the limit of time ended it.
        expected: about as many layers of samples will be walked.
        trials: what was measured.
    """

    trials: Trials

    def __init__(
        self,
        study: Study[SearchSection],
        parts: Parts,
        methods: space.Methods,
        known: space.Known,
        costs: space.Costs,
    ) -> None:
        self.study, self.options, self.parts = study, study.options, parts
        self.methods, self.known, self.costs = methods, known, costs
        self.finalists: list[Candidate] = []
        self.rungs: list[Rung] = []
        self.stopped = False
        self._random = np.random.default_rng([study.options.seed, 2])
        most = max(map(len, parts.search))
        self._shares = [count / most for count in rungs(self.options.trials, most)]
        samples = [len(parts.first(share)) for share in self._shares]
        self.expected = study.shape.depth * (samples[0] * (2 + GENERATIONS) + samples[-1] + len(parts.choose))

    def check_possible(self) -> None:
        """Refuse a goal that no schedule of the search can meet.

        Raises:
            GateError: names what the cheapest costs.
        """
        depth = self.study.shape.depth
        known = [one for one in self.methods.alone + self.methods.together if self.costs.within(one.schedule)]
        # what may keep some tokens in front of layer 0 may keep none
        first = 0 if known else max(1, self.study.shape.first_withdrawal)
        floor = self.costs.of(Combination(depth, withdraw=first).schedule())
        assert floor is not None
        for name, most in self.costs.bound.items():
            if floor[name] > most:
                what = {"flops": "prefill FLOPs", "kv": "KV cache"}[name]
                where = f" behind layer {first - 1}" if first else ""
                raise GateError(
                    f"no schedule costs at most {100 * most:.3g}% of the full model's {what}; without any visual token"
                    f"{where} it is {100 * floor[name]:.3g}%",
                    f"a larger --max-{name}",
                )

    def refused(self) -> dict[str, list[str]]:
        """Schedules that turned out not to be executable, by the reason."""
        found: dict[str, list[str]] = {}
        for name, why in self.trials.refused.items():
            found.setdefault(why, []).append(name)
        return found

    def run(self, trials: Trials) -> None:
        """Look, halve, and measure what came through on the samples that choose."""
        self.trials = trials
        alive = self._begin()
        joining = max(1, len(self._shares) - 2)
        for rung, share in enumerate(self._shares[1:], 1):
            if self.stopped:
                break
            places = self.parts.first(share)
            half = self._halved(alive)
            if rung == joining:
                half += self._by_the_runtime()
            if not self._measure(half, places):
                alive = self._few(alive)
                break
            self._places, alive = places, self._possible(half)
            self._note(half)
        if not self.stopped and len(self._shares) == 1:
            extra = self._by_the_runtime()
            self._measure(extra, self._places)
            alive = self._possible(alive + extra)
        self.finalists = self._few(alive)
        self.trials.measure(self.finalists, self.parts.choose)
        self.finalists = [one for one in self.finalists if one.name not in self.trials.refused]

    def _begin(self) -> list[Candidate]:
        """The first rung: probes, methods, combinations, and neighbours of the best of these."""
        options, shape, costs = self.options, self.study.shape, self.costs
        self._places = self.parts.first(self._shares[0])
        least, depth, total = max(1, shape.first_withdrawal), shape.depth, options.trials
        leaves = [Combination(depth, withdraw=k) for k in range(least, depth)]
        still = [Combination(depth, frozen=(d,), withdraw=depth) for d in range(depth)]
        if len(leaves) + len(still) > total // 3:
            still = []
        probes = [one.candidate() for one in leaves + still]
        within = [one for one in self.methods.together if costs.within(one.schedule)]
        if not still:
            probes = [one for one in probes if costs.within(one.schedule)][: max(1, total // 3)]
        ready = self._measure(probes, self._places, whole=True)
        taken = space.taken_by(probes)
        within = [one for one in within if not space.taken_by([one]) & taken]
        found = list(probes)
        if ready:
            parts = space.space_of(shape, self.known, self._least_lost(still))
            left = total - len(probes)
            some = spread([costs.main(one.schedule) for one in within], left // 3)
            of_methods = [within[place] for place in some]
            taken |= space.taken_by(of_methods)
            count = max(0, (left - len(of_methods)) // 3)
            new = of_methods + space.drawn(parts, costs, count, self._random, taken)
            for generation in range(GENERATIONS + 1):
                found += new
                ready = self._measure(new, self._places, whole=True)
                left = total - len(found)
                if not ready or generation == GENERATIONS or left <= 0:
                    break
                good = self._best_of_classes(self._possible(found))
                count = ceil(left / (GENERATIONS - generation))
                new = space.neighbours(good, parts, costs, count, self._random, taken)
        done = [one for one in found if self.trials.done(one, self._places)]
        self._note(done)
        return self._possible(done)

    def _least_lost(self, still: Sequence[Combination]) -> list[int]:
        """Layers, those first whose freezing alone costs the worst task least; the last ones first if unknown."""
        rows = {one.frozen[0]: self._row(one.candidate()) for one in still}
        kl = {layer: row["worst_kl"] for layer, row in rows.items() if row is not None}
        depth = self.study.shape.depth
        return sorted(range(depth), key=lambda layer: (kl.get(layer, 0.0), -layer))

    def _row(self, one: Candidate) -> Measured | None:
        if one.name in self.trials.refused or not self.trials.done(one, self._places):
            return None
        return self.trials.row(one, self._places, self.study.text)

    def _measure(self, candidates: Sequence[Candidate], places: Sequence[int], whole: bool = False) -> bool:
        minutes = self.options.minutes
        ready = self.trials.measure(
            candidates, places, None if minutes is None else 60 * minutes, whole=whole
        )
        self.stopped = self.stopped or not ready
        return ready

    def _possible(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Those within the goals of cost and not hopelessly far from the others, as far as is known."""
        rows = [(one, row) for one in candidates if (row := self._row(one)) is not None]
        cheap = [(one, row) for one, row in rows if within_cost(row, self.options)]
        near = [one for one, row in cheap if not _hopeless(row, self.options)]
        return near if len(near) >= FINALISTS else [one for one, _ in cheap]

    def _numbers(self, candidates: Sequence[Candidate]) -> tuple[list[float], list[float]]:
        """Cost and distance of each."""
        rows = [self.trials.row(one, self._places, self.study.text) for one in candidates]
        return [cost_of(self.options, row) for row in rows], [row["worst_kl"] for row in rows]

    def _halved(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        return [candidates[place] for place in better_half(*self._numbers(candidates), least=FINALISTS)]

    def _few(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """About so many as there is to choose from, the better ones of each class."""
        found = list(candidates)
        while len(found) > 2 * FINALISTS:
            half = self._halved(found)
            if len(half) == len(found):
                break
            found = half
        return found

    def _best_of_classes(self, candidates: Sequence[Candidate], count: int = 4) -> list[Candidate]:
        if not candidates:
            return []
        cost, far = self._numbers(candidates)
        of, found = classes(cost), list[Candidate]()
        for one in sorted(set(of)):
            mine = sorted((far[place], place) for place, name in enumerate(of) if name == one)
            found += [candidates[place] for _, place in mine[:count]]
        return found

    def _by_the_runtime(self) -> list[Candidate]:
        """The schedules that one pass does not know: one of each method after the other, the dearest first."""
        if self.known.streamed:
            return []
        mine = [one for one in self.methods.alone if self.costs.within(one.schedule)]
        mine.sort(key=lambda one: -self.costs.main(one.schedule))
        queues: dict[str, list[Candidate]] = {}
        for one in mine:
            queues.setdefault(one.method, []).append(one)
        found: list[Candidate] = []
        for turn in range(max(map(len, queues.values()), default=0)):
            found += [queue[turn] for queue in queues.values() if turn < len(queue)]
        return found[: min(RUNTIME, max(1, self.options.trials // 8))]

    def _note(self, candidates: Sequence[Candidate]) -> None:
        self.rungs.append({"schedules": len(candidates), "samples": len(self._places)})


def cost_of(options: SearchSection, row: TriedRow) -> float:
    """The cost that the search is about: of the KV cache where that alone is bounded, else of the prefill."""
    return row["kv_ratio"] if options.max_kv is not None and options.max_flops is None else flops_of(row)


def within_cost(row: TriedRow, options: SearchSection) -> bool:
    """Whether a row meets the goals of cost."""
    goals = options.goals
    return flops_of(row) <= goals.get("max_flops", float("inf")) and row["kv_ratio"] <= goals.get(
        "max_kv", float("inf")
    )


def meets(row: Measured, options: SearchSection) -> bool:
    """Whether a row meets all goals."""
    goals = options.goals
    return (
        within_cost(row, options)
        and row["worst_kl"] <= goals.get("max_kl", float("inf"))
        and row["worst_agreement"] >= goals.get("min_agreement", 0.0)
    )


def _hopeless(row: Measured, options: SearchSection) -> bool:
    """Whether a row is too far from the full model for few samples to be wrong about it."""
    goals = options.goals
    if row["worst_kl"] > _HOPELESS * goals.get("max_kl", float("inf")):
        return True
    return 1 - row["worst_agreement"] > _HOPELESS * (1 - goals.get("min_agreement", 0.0)) + 0.05
