"""What each method costs and changes on one model: withdrawal, VisiPruner, kept subsets, and controls.

Muted columns are not compared: alone they save no FLOPs in this runtime. Nor are frozen rows.
"""

from __future__ import annotations

from collections.abc import Sequence

from vtwcli.data.spec import DataSpec
from vtwcli.errors import UsageError
from vtwcli.io import console
from vtwcli.measure.candidates import compared, flops_of, token_counts
from vtwcli.measure.study import Study
from vtwcli.methods import METHODS
from vtwcli.methods.method import Candidate, Grid, Shape
from vtwcli.recipe.recipe import BudgetSection, ModelSection, ScheduleSection
from vtwcli.results.comparison import FORMAT, FORMAT_VERSION, Budget, TriedRow


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
        rule: VisiPruner's parameters that are not varied.

    Returns:
        The result document, plain JSON values.

    Raises:
        NotFoundError: model or data missing or unreadable, or no sample has a visual token.
        UsageError: options that do not fit the model.
    """
    study = Study.open(model, data, options)
    if study.streamed:
        console.note("layers are streamed: schedules are compared along the samples' reference answers")
    chosen = candidates(study.shape, options, rule)
    if study.streamed:
        chosen, without = study.streamable(chosen)
        for reason, methods in without.items():
            console.note(f"left out, since {reason} when layers are streamed: {', '.join(methods)}")
    found = study.try_(chosen, options.max_new_tokens, options.batch_size)
    rows, front = compared(chosen, found, study.text)
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
        for one in METHODS[name].compared(model, grid, fixed)
    ]
    return list({one.name: one for one in tried}.values())  # boundaries that fall together
