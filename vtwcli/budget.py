"""What each method costs and changes on one model: withdrawal, VisiPruner, kept subsets, and controls.

Muted columns are not compared: alone they save no FLOPs in this runtime. Nor are frozen rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from vtwcli.data import metrics
from vtwcli.data.sample import Sample
from vtwcli.data.spec import DataSpec
from vtwcli.errors import NotFoundError, UsageError
from vtwcli.io import console
from vtwcli.measure.answers import Answer
from vtwcli.measure.candidates import compared, flops_of, token_counts
from vtwcli.measure.study import STREAMED, Study
from vtwcli.methods import METHODS
from vtwcli.methods.method import Candidate, Grid, Shape
from vtwcli.models.inputs import encode
from vtwcli.recipe.recipe import BudgetSection, ModelSection, ScheduleSection
from vtwcli.results.comparison import FORMAT, FORMAT_VERSION, Budget, FullScore, LeftOut, TriedRow


def budget(
    model: ModelSection,
    data: Sequence[DataSpec] = (),
    options: BudgetSection = BudgetSection(),
    rule: ScheduleSection = ScheduleSection(),
) -> Budget:
    """Try schedules of every method on the same samples; see ``candidates`` for which.

    Args:
        model: which model, and where it runs; streamed layers are compared along reference answers.
        data: sources of samples, as for ``calibrate``.
        options: methods, ratios, sample counts, the budget.
        rule: VisiPruner's parameters that are not varied, and the guide of methods that need one.

    With ``options.tokens`` every method stands at an equal average number of visual tokens per layer, and tasks with
    references are scored on each schedule's own answers.

    Returns:
        The result document, plain JSON values.

    Raises:
        NotFoundError: model or data missing or unreadable, or no sample has a visual token.
        UsageError: options that do not fit the model.
    """
    study = Study.open(model, data, options)
    if study.streamed:
        console.note(STREAMED)
    equal = (
        None
        if options.tokens is None
        else at_equal_cost(study.shape, options, visual_tokens(study), rule.guide)
    )
    chosen = candidates(study.shape, options, rule) if equal is None else equal.candidates
    if study.streamed:
        chosen, without = study.streamable(chosen)
        for reason, methods in without.items():
            console.note(f"left out, since {reason} when layers are streamed: {', '.join(methods)}")
    free = equal is not None and not study.streamed
    found = study.try_(chosen, options.longest, free=free, lenient=True)
    for why in found.refused.values():
        console.note(f"left out: {why}")
    chosen = [one for number, one in enumerate(chosen) if number not in found.refused]
    found = replace(found, rows=[rows for rows in found.rows if rows], refused={})
    rows, front = compared(chosen, found, study.text)
    more: dict[str, Any] = {}
    if equal is not None:
        more = {"scores": scores_of(found.samples, found.full) if free else {}, "left_out": equal.left_out}
        for row, answers in zip(rows, found.rows, strict=True):
            row["tokens"] = equal.targets[row["name"]]
            said = scores_of(found.samples, answers) if free else {}
            row["scores"] = {task: one["value"] for task, one in said.items()}
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "model": study.model(),
        "num_layers": study.shape.depth,
        "options": options.model_dump(mode="json"),
        "rule": rule.rule(),
        "cost": token_counts(found),
        "tasks": found.counts,
        "candidates": rows,
        "pareto": front,
        **more,  # type: ignore[typeddict-item]
        "max_flops": options.max_flops,
        "best": best_within(rows, options.max_flops),
        **study.origin(options.seed),
        "run": {**study.run(), "streamed": study.streamed},
    }


def best_within(rows: Sequence[TriedRow], max_flops: float | None) -> str | None:
    """The name of the row with the smallest KL that costs at most ``max_flops``; of equal ones the cheapest."""
    affordable = [row for row in rows if max_flops is not None and flops_of(row) <= max_flops]
    return min(affordable, key=lambda row: (row["kl"], flops_of(row)))["name"] if affordable else None


def candidates(
    model: Shape,
    options: BudgetSection = BudgetSection(),
    rule: ScheduleSection = ScheduleSection(),
) -> list[Candidate]:
    """The schedules that are compared on a model: those that each method names.

    Raises:
        UsageError: a ``keep_layer`` that the model does not have.
    """
    at = max(options.keep_layer, model.first_withdrawal, 1)
    if at >= model.depth:
        raise UsageError(f"--keep-layer: {at} is not a layer of the model (0..{model.depth - 1})")
    grid = Grid(options.ratios, at, options.thresholds, options.seed)
    fixed = rule.rule()
    tried = [
        one
        for name in METHODS
        if name in options.methods
        for one in METHODS[name].compared(
            model, grid, {"guide": rule.guide} if METHODS[name].guided else fixed
        )
    ]
    return list({one.name: one for one in tried}.values())  # boundaries that fall together


@dataclass(frozen=True)
class Equal:
    """What is compared at equal cost.

    Attributes:
        candidates: the schedules.
        targets: how many visual tokens a layer of each is to hold on average, by its name.
        left_out: which methods have none.
    """

    candidates: list[Candidate]
    targets: dict[str, float]
    left_out: list[LeftOut]


def at_equal_cost(model: Shape, options: BudgetSection, visual: float, guide: str | None = None) -> Equal:
    """Every method's schedule for every number of tokens, and which have none.

    Args:
        visual: tokens that a prompt has on average; what is asked for is a share of them, the same in every prompt.
        guide: the model that methods get that need a second one; None: they are left out.

    Raises:
        UsageError: more tokens than a prompt has.
    """
    assert options.tokens is not None
    found, missing = Equal([], {}, []), dict[str, list[float]]()
    for target in sorted(set(options.tokens), reverse=True):
        if target >= visual:
            raise UsageError(
                f"--tokens: {target:g} is not fewer than the {visual:.4g} visual tokens that a prompt has"
            )
        for name in METHODS:
            if name not in options.methods:
                continue
            method = METHODS[name].at_share(model, target / visual)
            if method is not None and method.guided:
                method = None if guide is None else method.model_copy(update={"guide": guide})
            if method is None:
                missing.setdefault(name, []).append(target)
                continue
            parameters = method.model_dump(mode="json", exclude_none=True)
            title = f"{name} {target:g}"
            found.candidates.append(Candidate(title, name, method.schedule(), parameters))
            found.targets[title] = target
    for name, targets in missing.items():
        alone = METHODS[name].guided and guide is None
        why = "it needs a second model: --set schedule.guide=MODEL" if alone else METHODS[name].refused(model)
        why = why or "no setting of it has this average number of tokens"
        found.left_out.append({"method": name, "tokens": targets, "why": why})
    if not found.candidates:
        raise UsageError(
            "--tokens: none of the methods has a setting for these numbers", "more tokens or methods"
        )
    return found


def visual_tokens(study: Study[Any]) -> float:
    """How many visual tokens a prompt has on average, of those that have any.

    Raises:
        NotFoundError: none has.
    """
    counts = [int(encode(study.loaded, sample).visual.sum()) for sample in study.samples]
    seeing = [count for count in counts if count]
    if not seeing:
        raise NotFoundError("no sample has a visual token, so there is nothing to prune", "add images")
    return sum(seeing) / len(seeing)


def scores_of(samples: Sequence[Sample], answers: Sequence[Answer]) -> dict[str, FullScore]:
    """The metric of each task whose samples have references, of one variant's answers."""
    found: dict[str, FullScore] = {}
    for task in dict.fromkeys(sample.task for sample in samples):
        mine = [
            (one, answer.text)
            for one, answer in zip(samples, answers, strict=True)
            if one.task == task and one.references
        ]
        if mine:
            judged, said = [one for one, _ in mine], [text for _, text in mine]
            metric = judged[0].metric
            found[task] = {"metric": metric, "value": float(metrics.aggregate(metric, said, judged)["mean"])}
    return found
