"""The best schedule within a goal: methods, their parameters and combinations, by successive halving; then a promise.

The samples of each task are split in three. One part searches: many schedules on few of its samples, the better half
of each class of cost on twice as many, and so on. One chooses among what came through. One, which had no say in
either, tests what the choice may cost on inputs like these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from vtwcli.data.spec import DataSpec
from vtwcli.errors import UsageError
from vtwcli.io import console
from vtwcli.machine.libraries import versions
from vtwcli.measure.candidates import pareto, token_counts
from vtwcli.measure.guaranteed import of_candidates
from vtwcli.measure.promised import counted, promise_of
from vtwcli.measure.study import STREAMED, Study
from vtwcli.recipe.recipe import ModelSection, ScheduleSection
from vtwcli.recipe.search import GOALS, SearchSection
from vtwcli.results.resume import kept, key_of, stamp
from vtwcli.results.search import FORMAT, FORMAT_VERSION, FoundRow, Search
from vtwcli.searching import space
from vtwcli.searching.hunt import Hunt, cost_of, meets
from vtwcli.searching.parts import parts_of
from vtwcli.searching.trials import UNITS, Trials, measured
from vtwcli.sweep.layers import takes_masks


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
        "parts": {"search": _counts(study, parts.looked), "choose": _counts(study, parts.choose)},
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
        "samples": [
            {"id": sample.id, "fingerprint": fingerprint, "task": sample.task}
            for sample, fingerprint in zip(study.samples, study.mix.fingerprints, strict=True)
        ],
        **study.origin(options.seed),
    }
    if ordered:
        promised = of_candidates(
            study.of(parts.guarantee), promise, [by_name[name] for name in ordered], options.longest
        )
        held = [one["candidate"] for one in promised["tested"] if one["holds"]]
        best = ordered[0] if options.closest or not held else held[-1]
        [test] = [one for one in promised["tested"] if one["candidate"] == best]
        counts = promised["samples"]
        document["best"], document["promised"] = best, test["holds"]
        document["proven"] = max(promise.bound([test["loss"][task]] * n) for task, n in counts.items())
        document["guarantee"] = {
            **promised,
            "ordered_on": {
                task: n + document["parts"]["search"][task] for task, n in document["parts"]["choose"].items()
            },
        }
        how: dict[str, Any] = {
            "search": options.goals,
            "confidence": options.confidence,
            "loss": options.loss,
        }
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


def _judged(hunt: Hunt, options: SearchSection, found: Any) -> list[FoundRow]:
    """Rows of what came through, on the samples that choose."""
    rows = [measured(one, number, found, hunt.study.text) for number, one in enumerate(hunt.finalists)]
    return [{**row, "meets": meets(row, options), "pareto": False} for row in rows]


def _front_within(rows: Sequence[FoundRow], options: SearchSection) -> list[str]:
    """The front of those rows that meet the goals, the cheapest first."""
    good = [row for row in rows if row["meets"]]
    return pareto(good, partial(cost_of, options), lambda row: row["worst_kl"])


def _counts(study: Study[SearchSection], places: Sequence[int]) -> dict[str, int]:
    return counted([study.samples[place].task for place in sorted(places)])


def _key(study: Study[SearchSection], rule: ScheduleSection) -> str:
    """What a kept search depends on."""
    loaded, options = study.loaded, study.options
    shaping: Mapping[str, Any] = options.model_dump(
        mode="json", exclude={"risk", "confidence", "loss", "eta", "minutes", "resume"}
    )
    model = (loaded.name, loaded.revision, str(loaded.dtype), stamp(loaded.path))
    how = (loaded.device.type, study.streamed)
    return key_of(
        "search", model, how, shaping, rule.model_dump(mode="json"), study.mix.fingerprints, versions()
    )
