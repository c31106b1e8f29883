"""The best schedule within a goal: methods, their parameters and combinations, by successive halving; then a promise.

The samples of each task are split in three. One part searches: many schedules on few of its samples, the better half
of each class of cost on twice as many, and so on. One chooses among what came through. One, which had no say in
either, tests what the choice may cost on inputs like these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np

from vtwcli.data.spec import DataSpec
from vtwcli.errors import GateError, NotFoundError, UsageError
from vtwcli.io import console
from vtwcli.machine import distributed
from vtwcli.machine.libraries import versions
from vtwcli.measure.candidates import flops_of, pareto, token_counts
from vtwcli.measure.guaranteed import of_candidates
from vtwcli.measure.promised import counted, halved, promise_of
from vtwcli.measure.study import STREAMED, Study
from vtwcli.methods.method import Candidate
from vtwcli.models.inputs import encode
from vtwcli.recipe.recipe import ModelSection, ScheduleSection
from vtwcli.recipe.search import GOALS, SearchSection
from vtwcli.results.comparison import TriedRow
from vtwcli.results.resume import kept, key_of, stamp
from vtwcli.results.search import FORMAT, FORMAT_VERSION, FoundRow, Rung, Search
from vtwcli.searching import space
from vtwcli.searching.combined import Combination
from vtwcli.searching.halving import FINALISTS, better_half, classes, rungs, spread
from vtwcli.searching.trials import UNITS, Measured, Trials, measured
from vtwcli.sweep.layers import takes_masks

RUNTIME = 16
"""Schedules that only the runtime can run, one by one; they join near the end."""
GENERATIONS = 3
"""Of neighbours of what is best so far."""
_HOPELESS = 4  # times as far from the full model as the goal allows


def search(
    model: ModelSection,
    data: Sequence[DataSpec] = (),
    options: SearchSection = SearchSection(),
    rule: ScheduleSection = ScheduleSection(),
    *,
    state: Path | None = None,
) -> Search:
    """Look for the schedule that is closest to the full model within a cost, or cheapest within a distance.

    Args:
        model: which model, and where it runs; streamed layers are compared along reference answers.
        data: sources of samples, as for ``calibrate``.
        options: goals, bounds of the search, and what is to be promised.
        rule: VisiPruner's parameters that are not varied, and the guide of methods that need one.
        state: names the file that keeps what was measured across an interruption (``options.resume``).

    Returns:
        The result document, plain JSON values.

    Raises:
        NotFoundError: model or data missing or unreadable, or no sample has a visual token.
        UsageError: no goal, too few samples for the promise, or options that do not fit the model.
        GateError: no schedule is as cheap as the goal; told before anything is measured.
    """
    check_goals(options)
    study = Study.open(model, data, options)
    if study.streamed:
        if options.loss == "metric":
            raise UsageError("--loss metric: layers are streamed and cannot answer", "choose another --loss")
        console.note(STREAMED)
    parts = parts_of(study)
    promise, text = promise_of(options), study.text
    assert promise is not None
    known = space.Known(
        study.loaded.family,
        study.loaded.layers,
        takes_masks(study.loaded.model, study.loaded.family),
        study.streamed,
    )
    methods = space.of_methods(options.methods, study.shape, known, rule, options.seed)
    for why, names in methods.left_out.items():
        console.note(f"left out: {', '.join(names)}: {why}")
    bound = {key: options.goals[f"max_{key}"] for key in ("flops", "kv") if f"max_{key}" in options.goals}
    costs = space.Costs(text, parts.text, parts.visual, bound)
    hunt = Hunt(study, parts, methods, known, costs)
    hunt.check_possible()
    key = _key(study, rule)
    units = [f"unit {number}" for number in range(UNITS)]
    with (
        kept(state, key, units, "parts of the search") as (done, keep),
        console.progress("search", hunt.expected) as bar,
    ):
        hunt.run(Trials(study, done, keep, bar))
        bar.advance(max(0, hunt.expected - bar.done))
        chosen_from = hunt.trials.tried(hunt.finalists, parts.choose) if hunt.finalists else None
    rows = _judged(hunt, options, chosen_from)
    front = pareto(rows, partial(cost_of, options), lambda row: row["worst_kl"])
    ordered = list(reversed(_front_within(rows, options)))
    by_name = {one.name: one for one in hunt.finalists}
    document: Search = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "model": study.model(),
        "num_layers": study.shape.depth,
        "options": options.recorded(),
        "rule": rule.rule(),
        "goals": options.goals,
        "positions": options.positions,
        "eta": options.eta,
        "parts": {"search": _counts(study, parts.search), "choose": _counts(study, parts.choose)},
        "rungs": hunt.rungs,
        "stopped": hunt.stopped,
        "left_out": [
            {"methods": names, "why": why} for why, names in (methods.left_out | hunt.refused()).items()
        ],
        "cost": token_counts(chosen_from)
        if chosen_from
        else {"convention": "flops", "visual_tokens": float(parts.visual), "text_tokens": float(parts.text)},
        "tasks": {task: {"samples": n} for task, n in _counts(study, parts.choose).items()},
        "candidates": [{**row, "pareto": row["name"] in front} for row in rows],
        "pareto": front,
        "best": None,
        "promised": False,
        "proven": None,
        "schedule": None,
        **study.origin(options.seed),
    }
    if ordered:
        promised = of_candidates(
            study.of(parts.guarantee), promise, [by_name[name] for name in ordered], options.max_new_tokens
        )
        held = [one["candidate"] for one in promised["tested"] if one["holds"]]
        best = ordered[0] if options.closest or not held else held[-1]
        [test] = [one for one in promised["tested"] if one["candidate"] == best]
        counts = promised["samples"]
        document["best"], document["promised"] = best, test["holds"]
        document["proven"] = max(promise.bound([test["loss"][task]] * n) for task, n in counts.items())
        document["guarantee"] = {
            **promised,
            "ordered_on": {task: n + document["parts"]["search"][task] for task, n in document["parts"]["choose"].items()},
        }
        how: dict[str, Any] = {"search": options.goals, "confidence": options.confidence, "loss": options.loss}
        how["risk"] = options.risk if test["holds"] else document["proven"]
        schedule = by_name[best].schedule
        provenance = {**schedule.provenance, **study.provenance(**how)}
        document["schedule"] = schedule.model_copy(update={"provenance": provenance}).to_dict()
    document["run"] = {**study.run(), "streamed": study.streamed}
    return document


def check_goals(options: SearchSection) -> None:
    """Refuse a search that looks for nothing.

    Raises:
        UsageError: no goal is given.
    """
    if not options.goals:
        named = ", ".join("--" + name.replace("_", "-") for name in GOALS)
        raise UsageError("a search needs a goal", f"give one of {named}")


@dataclass(frozen=True)
class Parts:
    """Places of samples with visual tokens in three disjoint parts; those of a task are drawn by the seed.

    Attributes:
        search: in the order in which they are used, a list for each task.
        choose: to choose among what came through.
        guarantee: to test the choice; samples without visual tokens are not looked for here.
        text, visual: mean tokens of a prompt of the first two, rounded.
    """

    search: tuple[tuple[int, ...], ...]
    choose: tuple[int, ...]
    guarantee: tuple[int, ...]
    text: int
    visual: int

    def first(self, share: float) -> list[int]:
        """Places of this share of each task's samples that search, rounded up."""
        return [place for mine in self.search for place in mine[: ceil(share * len(mine) - 1e-9)]]


def parts_of(study: Study[SearchSection]) -> Parts:
    """The three parts of a study's samples.

    Raises:
        NotFoundError: no sample has a visual token.
        UsageError: a task with too few.
    """
    samples, seed = study.samples, study.options.seed
    ordering, testing = halved(samples, seed)
    choosing, searching = halved([samples[place] for place in ordering], seed)

    def work() -> dict[int, tuple[int, int]]:
        found = {}
        for number, place in distributed.share(ordering):
            one = encode(study.loaded, samples[place])
            visual = int(one.visual.sum())
            found[number] = (visual, one.prompt_length - visual)
        return found

    counts = dict(zip(ordering, distributed.gathered(work), strict=True))
    seeing = [place for place in ordering if counts[place][0]]
    if not seeing:
        raise NotFoundError("no sample has a visual token, so there is nothing to prune", "add images")
    choose = [ordering[n] for n in choosing if counts[ordering[n]][0]]
    look = [ordering[n] for n in searching if counts[ordering[n]][0]]
    tasks = list(dict.fromkeys(samples[place].task for place in seeing))
    for task in tasks:
        if not all(any(samples[place].task == task for place in part) for part in (choose, look)):
            raise UsageError(f"a search needs at least 4 samples with images of each task, {task} has fewer", "a larger --limit or more data")
    generator = np.random.default_rng([seed, 1])
    mine = [[place for place in look if samples[place].task == task] for task in tasks]
    orders = tuple(tuple(generator.permutation(places).tolist()) for places in mine)
    visual, text = (round(float(np.mean([counts[place][i] for place in seeing]))) for i in (0, 1))
    return Parts(orders, tuple(choose), tuple(testing), text, visual)


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
        depth, least = self.study.shape.depth, self.study.shape.first_withdrawal
        floor = self.costs.of(Combination(depth, withdraw=max(1, least)).schedule())
        nothing = [one for one in self.methods.alone + self.methods.together if self.costs.within(one.schedule)]
        assert floor is not None
        for name, most in self.costs.bound.items():
            if floor[name] > most and not nothing:
                what = {"flops": "prefill FLOPs", "kv": "KV cache"}[name]
                raise GateError(
                    f"no schedule costs at most {100 * most:.3g}% of the full model's {what}; without any visual "
                    f"token behind layer {max(1, least) - 1} it is {100 * floor[name]:.3g}%",
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
        for share in self._shares[1:]:
            if self.stopped:
                break
            places = self.parts.first(share)
            half = self._halved(alive)
            if share == self._shares[-2:][0]:
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
            some = spread([costs.main(one.schedule) for one in within], left // 2)
            of_methods = [within[place] for place in some]
            taken |= space.taken_by(of_methods)
            count = max(0, (left - len(of_methods)) // 2)
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
        ready = self.trials.measure(candidates, places, None if minutes is None else 60 * minutes, whole=whole)
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
        return found[:RUNTIME]

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


def _judged(hunt: Hunt, options: SearchSection, found: Any) -> list[FoundRow]:
    """Rows of what came through, on the samples that choose."""
    rows = [measured(one, number, found, hunt.study.text) for number, one in enumerate(hunt.finalists)]
    return [{**row, "meets": meets(row, options), "pareto": False} for row in rows]


def _front_within(rows: Sequence[FoundRow], options: SearchSection) -> list[str]:
    """The front of those rows that meet the goals, the cheapest first."""
    good = [row for row in rows if row["meets"]]
    return pareto(good, partial(cost_of, options), lambda row: row["worst_kl"])


def _counts(study: Study[SearchSection], places: Sequence[Any]) -> dict[str, int]:
    flat = [one for place in places for one in (place if isinstance(place, tuple) else (place,))]
    return counted([study.samples[place].task for place in flat])


def _key(study: Study[SearchSection], rule: ScheduleSection) -> str:
    """What a kept search depends on."""
    loaded, options = study.loaded, study.options
    shaping: Mapping[str, Any] = options.model_dump(
        mode="json", exclude={"risk", "confidence", "loss", "eta", "resume"}
    )
    model = (loaded.name, loaded.revision, str(loaded.dtype), stamp(loaded.path))
    how = (loaded.device.type, study.streamed)
    return key_of("search", model, how, shaping, rule.model_dump(mode="json"), study.mix.fingerprints, versions())
