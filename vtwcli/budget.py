"""What each method costs and changes on one model: withdrawal, VisiPruner, kept subsets, and controls.

Muted columns and frozen rows are not compared: alone they save no FLOPs in this runtime.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from vtwcli.data.spec import DataSpec
from vtwcli.errors import UsageError
from vtwcli.judge.flops import TextShape
from vtwcli.machine.libraries import versions
from vtwcli.measure.candidates import Candidate, described, flops_of, pareto, token_counts, tried
from vtwcli.measure.preparation import check_model, load_model, read_samples
from vtwcli.methods import visipruner, vtw
from vtwcli.recipe.recipe import BudgetSection, ModelSection, ScheduleSection
from vtwcli.results.provenance import model_of, run_of
from vtwcli.schedule.schedule import Action, Keep, Schedule, Select, Withdraw

FORMAT_VERSION = 1


def budget(
    model: ModelSection,
    data: Sequence[DataSpec] = (),
    options: BudgetSection = BudgetSection(),
    rule: ScheduleSection = ScheduleSection(),
) -> dict[str, Any]:
    """Try schedules of every method on the same samples; see ``candidates`` for which.

    Args:
        model: which model, and where it runs; layers are not streamed here.
        data: sources of samples, as for ``calibrate``.
        options: methods, ratios, sample counts, the budget.
        rule: VisiPruner's parameters that are not varied.

    Returns:
        The result document, plain JSON values: ``candidates`` (a row each, see ``candidates.described``, and
        ``pareto``, whether it is on the front), ``pareto`` (names, cheapest first), ``max_flops``, ``best`` (the name
        of the schedule closest to the full model within the budget, None where there is none), ``cost`` (what the
        ratios refer to), ``tasks``, ``model``, ``data``, ``options``, ``versions``, ``seed`` and ``run``. Only
        ``run`` differs between equal runs.

    Raises:
        NotFoundError: model or data missing or unreadable, or no sample has a visual token.
        UsageError: options that do not fit the model.
    """
    began = time.perf_counter()
    check_model(model)
    mix = read_samples(model, data, options)
    loaded = load_model(model)
    timing = {"load": time.perf_counter() - began}
    depth, shape = len(loaded.layers), TextShape.from_config(loaded.model.config)
    chosen = candidates(depth, loaded.family.first_withdrawal, options, rule)
    begun = time.perf_counter()
    found = tried(loaded, chosen, mix.samples, options.max_new_tokens, options.batch_size)
    timing["schedules"] = time.perf_counter() - begun
    rows = [described(one, number, found, shape) for number, one in enumerate(chosen)]
    front = pareto(rows)
    for row in rows:
        row["pareto"] = row["name"] in front
    timing["total"] = time.perf_counter() - began
    return {
        "format": "vtw-budget",
        "format_version": FORMAT_VERSION,
        "model": model_of(loaded),
        "num_layers": depth,
        "options": options.model_dump(mode="json"),
        "rule": rule.model_dump(mode="json", exclude={"file", "layer", "method"}),
        "cost": token_counts(found),
        "tasks": {task: {"samples": found.tasks.count(task)} for task in dict.fromkeys(found.tasks)},
        "candidates": rows,
        "pareto": front,
        "max_flops": options.max_flops,
        "best": best_within(rows, options.max_flops),
        "data": list(mix.sources),
        "skipped": mix.skipped,
        "seed": options.seed,
        "versions": versions(),
        "run": run_of(loaded, timing),
    }


def best_within(rows: Sequence[dict[str, Any]], max_flops: float | None) -> str | None:
    """The name of the row with the smallest KL that costs at most ``max_flops``; of equal ones the cheapest."""
    affordable = [row for row in rows if max_flops is not None and flops_of(row) <= max_flops]
    return min(affordable, key=lambda row: (row["kl"], flops_of(row)))["name"] if affordable else None


def candidates(
    depth: int,
    first_withdrawal: int,
    options: BudgetSection = BudgetSection(),
    rule: ScheduleSection = ScheduleSection(),
) -> list[Candidate]:
    """The schedules that are compared on a model of ``depth`` layers.

    ===============  ==============================================================================================
    method           schedules
    ===============  ==============================================================================================
    ``vtw``          withdrawal at every layer
    ``visipruner``   shallow boundaries 0 and, as published, 6 of 32 layers; five thresholds of contribution
    ``attention``    at ``keep_layer`` the tokens that the last row attends to most (FastV, arXiv 2403.06764)
    ``contribution`` the same by the norm of contribution
    ``random``       a control: as many tokens, drawn by the seed
    ``uniform``      a control: every n-th token
    ``two-step``     ``attention`` first, then withdrawal at half and three quarters of the depth
    ===============  ==============================================================================================

    Raises:
        UsageError: a ``keep_layer`` that the model does not have.
    """
    at = max(options.keep_layer, first_withdrawal, 1)
    if at >= depth:
        raise UsageError(f"--keep-layer: {at} is not a layer of the model (0..{depth - 1})")
    found: list[Candidate] = []

    def add(name: str, method: str, schedule: Schedule, **parameters: Any) -> None:
        if method in options.methods:
            found.append(Candidate(name, method, schedule, parameters))

    for k in range(first_withdrawal, depth):
        add(f"K={k}", "vtw", vtw.schedule(k), layer=k)
    fixed = rule.model_dump(
        include={"layer_threshold", "exit_threshold", "exit_layers", "consecutive", "layer0"}
    )
    for shallow in sorted({0, round(depth * 6 / 32)}):
        shallow = max(
            shallow, first_withdrawal - 2
        )  # the rule keeps two layers behind its boundary at the earliest
        if shallow > depth - 3:
            continue
        for threshold in options.thresholds:
            varied: dict[str, Any] = {"shallow_mid_layer": shallow, "tokens_threshold": threshold}
            schedule = visipruner.schedule(**fixed, **varied)
            add(f"visipruner S={shallow} t={threshold:g}", "visipruner", schedule, **varied)
    for score in ("attention", "contribution", "random", "uniform"):
        for ratio in options.ratios:
            keep = _keep(at, score, ratio, options.seed)
            add(f"{score} {ratio:.0%}", score, Schedule(actions=(keep,)), layer=at, ratio=ratio)
    for ratio in options.ratios:
        for k in sorted({depth // 2, depth * 3 // 4} - set(range(at + 1))):
            actions: tuple[Action, ...] = (
                _keep(at, "attention", ratio, options.seed),
                Withdraw(at=k, action="withdraw"),
            )
            name = f"attention {ratio:.0%}, K={k}"
            add(name, "two-step", Schedule(actions=actions), layer=at, ratio=ratio, withdraw=k)
    unique = {one.name: one for one in found}  # boundaries that fall together
    return list(unique.values())


def _keep(at: int, score: Any, ratio: float, seed: int) -> Keep:
    select = Select(score=score, ratio=ratio, seed=seed if score == "random" else 0)
    return Keep(at=at, action="keep", select=select)
