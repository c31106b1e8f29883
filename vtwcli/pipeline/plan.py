"""Runs a recipe's steps in one directory: what is still valid is kept, the rest runs, a failed gate stops the export.

Steps are those of ``steps.STEPS``, in this order; a step belongs to a recipe that has its section. ``run.json`` in the
directory remembers for each finished step the digests of its inputs and of its files.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from vtwcli.errors import UsageError, VtwError
from vtwcli.io import console, documents, files, staging
from vtwcli.io.outputs import Inputs, check_no_input, inputs_of, is_ours, same_file
from vtwcli.machine.distributed import is_main
from vtwcli.machine.libraries import versions
from vtwcli.pipeline.fingerprint import data_records, digest, file_digest, model_record
from vtwcli.pipeline.run import (
    KEPT,
    LOCK,
    RECIPE,
    RUN,
    SUMMARY,
    Planned,
    Record,
    Run,
    Step,
    read_run,
    resolved,
    save,
    seen_from,
)
from vtwcli.pipeline.steps import STEPS, is_run_file, steps_of
from vtwcli.recipe.defaults import default_data
from vtwcli.recipe.recipe import Recipe


def make_plan(
    recipe: Recipe,
    folder: Path,
    *,
    text: str | None = None,
    only: Collection[str] = (),
    start: str | None = None,
    force: bool = False,
    file: Path | None = None,
) -> Run:
    """Find out what there is to do; reads the model's and the data's fingerprints, and writes nothing.

    A kept result is valid while the recipe's section, the model, the data, the tool's version and the steps before it
    are those that it came from, and its files are as they were written.

    Args:
        recipe: as loaded, paths as seen from here.
        folder: the output directory; need not exist.
        text: the recipe's file as it is written.
        only: run these steps alone; what they need must be there and valid.
        start: run this step and those behind it, valid results or not.
        force: run every step, in a directory where nothing but the results of runs is.
        file: the recipe's file, which no step may write.

    Raises:
        UsageError: nothing to run, a step that is not there, or a file that the run did not write is in its way.
        NotFoundError: model or data missing or unreadable.
    """
    recipe = recipe.asked()
    names = steps_of(recipe)
    for name in [*only, *([] if start is None else [start])]:
        if name not in names:
            near = documents.nearest(name, names)
            raise UsageError(
                f"{name!r} is not a step of this recipe",
                f"did you mean {near!r}?" if near else f"its steps: {', '.join(names)}",
            )
    if files.present(folder) and not folder.is_dir():
        raise UsageError(f"{folder} exists and is not a directory", "choose another --output")
    files.check_folder(folder)
    seen = staging.signature(folder / RUN)
    records, started = read_run(folder, force)
    model = model_record(recipe.model)
    data: dict[str, str] = {}
    inputs: dict[str, dict[str, str]] = {}
    for name in names:
        inputs[name] = _inputs(recipe, folder, STEPS[name], model, inputs, data)
    steps: list[Planned] = []
    first = names.index(start) if start is not None else len(names)
    for i, name in enumerate(names):
        stale = _stale(folder, name, inputs[name], records.get(name))
        if only and name not in only:
            if stale and any(name in STEPS[one].follows for one in only):
                raise UsageError(
                    f"{name} has no valid result ({stale})", f"leave out --only, or --only {name} too"
                )
            runs, why = False, "not asked for" if stale else KEPT
        elif force or i >= first or name in only:
            runs, why = True, stale or "asked for"
        else:
            runs, why = bool(stale), stale or KEPT
        steps.append(Planned(STEPS[name], inputs[name], runs, why))
    running = [one.step for one in steps if one.runs]
    owned = _check_way(folder, running, records, started, force, run_inputs(recipe, file))
    return Run(recipe, folder, text, model, steps, records, started, file=file, owned=owned, seen=seen)


def execute(run: Run) -> dict[str, Any]:
    """Run what ``make_plan`` planned and write the results.

    Returns:
        The run's document. ``passed`` is False, and ``failure`` says why, when no layer qualified or a gate failed;
        then no later step ran and nothing was exported.

    Raises:
        VtwError: a step failed otherwise. Steps that finished before it are kept.
    """
    save(run)  # before anything else: it says whose directory this is
    if is_main() and not (run.file and same_file(run.folder / RECIPE, run.file)):
        files.write_text(run.folder / RECIPE, documents.to_yaml(resolved(run.recipe, run.folder)))
    total = len(run.steps)
    for number, planned in enumerate(run.steps, 1):
        if run.failure is not None:
            console.note(f"[{number}/{total}] {planned.name}: not run")
            continue
        if planned.runs or planned.kept:
            run.reached.add(planned.name)
        if planned.runs:
            _run_step(run, planned)
            how = f"{run.records[planned.name].seconds:.1f} s"
        elif planned.kept:
            how = "kept"
        else:
            continue
        console.note(f"[{number}/{total}] {planned.name}: {run.records[planned.name].words} ({how})")
        run.failure = planned.step.judge(run)
    run.finished = True
    save(run)
    return run.document()


def _run_step(run: Run, planned: Planned) -> None:
    """Run a step and keep its record; until it has finished, its files belong to nobody's result."""
    run.records.pop(planned.name, None)
    run.started.add(planned.name)
    save(run)
    began = time.perf_counter()
    try:
        words, values = planned.step.run(run)
    except BaseException as error:  # whatever ends the run, its file and its summary say so
        run.failure = f"{planned.name}: {_reason(error)}"
        save(run)
        raise
    written = [run.folder / file for file in planned.step.writes.values() if is_main()]
    digests = {str(file.relative_to(run.folder)): file_digest(file) for file in written if file.is_file()}
    seconds = round(time.perf_counter() - began, 3)
    run.records[planned.name] = Record(
        inputs=planned.inputs, files=digests, seconds=seconds, words=words, result=values
    )
    run.started.discard(planned.name)
    save(run)


def _reason(error: BaseException) -> str:
    if isinstance(error, VtwError):
        return error.message
    return "interrupted" if isinstance(error, KeyboardInterrupt | SystemExit) else type(error).__name__


def _inputs(
    recipe: Recipe,
    folder: Path,
    step: Step,
    model: dict[str, Any],
    earlier: Mapping[str, dict[str, str]],
    data: dict[str, str],
) -> dict[str, str]:
    """The digests of what a step depends on; the same wherever the command is called."""
    placed = seen_from(recipe, folder)
    section = getattr(placed, step.name)
    options = [section.model_dump(mode="json", exclude={"resume"}), *step.depends(recipe, placed)]
    models: list[Any] = [model["fingerprint"], placed.model.model_dump()]
    for name in step.other_models(recipe):
        models.append(model_record(recipe.model.model_copy(update={"name": name}))["fingerprint"])
    found = {
        "options": digest(options),
        "model": digest(models),
        "tool": digest(versions()),
        "after": digest([earlier.get(one) for one in step.follows]),
    }
    if step.reads_data:
        found["data"] = _data(recipe, placed, section, data)
    return found


def _data(recipe: Recipe, placed: Recipe, section: Any, known: dict[str, str]) -> str:
    choice = (section.limit, section.seed, section.skip_bad)
    if str(choice) not in known:  # steps that take the same samples read them once
        specs = list(recipe.data) or default_data(recipe.model.name)
        records = data_records(specs, limit=choice[0], seed=choice[1], skip_bad=choice[2])
        # the records name what was read as seen from here
        plain = [record | {"source": None, "path": None} for record in records]
        known[str(choice)] = digest([[spec.model_dump(mode="json") for spec in placed.data or specs], plain])
    return known[str(choice)]


def _stale(folder: Path, name: str, inputs: dict[str, str], record: Record | None) -> str | None:
    """Why a step's kept result cannot be taken, or None when it can."""
    if record is None:
        return "no result yet"
    if changed := [kind for kind in inputs if record.inputs.get(kind) != inputs[kind]]:
        words = {"after": "an earlier step", "tool": "versions", "options": "its options"}
        return f"changed: {', '.join(words.get(kind, kind) for kind in changed)}"
    missing = [file for file in record.files if not (folder / file).is_file()]
    return f"{missing[0]} is missing" if missing else None


def run_inputs(recipe: Recipe, file: Path | None) -> Inputs:
    """What the run reads from this machine."""
    specs = [name for spec in recipe.data for name in (spec.source, spec.path)]
    return inputs_of(
        {"the model": recipe.model.name, "the baseline": recipe.eval.baseline, "the recipe": file}
        | {"the recipe's schedule": recipe.schedule.file, "the data": specs}
    )


def _check_way(
    folder: Path,
    steps: Collection[Step],
    records: Mapping[str, Record],
    started: Collection[str],
    force: bool,
    inputs: Inputs,
) -> frozenset[Path]:
    """Refuse to replace what no run wrote, what somebody changed since, and what the run reads.

    Args:
        steps: those that run.

    Returns:
        Files that runs wrote, and that this one may replace.

    Raises:
        UsageError: a file in the way.
    """
    hint = "choose another --output" if force else "choose another --output, or --force to replace it"
    if not files.present(folder / RUN):
        for name in (RECIPE, SUMMARY):
            if files.present(folder / name) and not any(same_file(folder / name, file) for _, file in inputs):
                raise UsageError(f"{folder / name} exists already", hint)
    for name in (RUN, SUMMARY):
        check_no_input(folder / name, inputs)
    for record in records.values():
        for file, known in record.files.items():
            path = folder / file
            if not force and path.is_file() and file_digest(path) != known:
                raise UsageError(f"{path} was changed since vtw run wrote it", hint)
    owned = frozenset(folder / file for record in records.values() for file in record.files)
    for step in steps:
        step.check_way(folder, owned, force or step.name in started, inputs, hint)
    if force:
        _check_strangers(folder)
    return owned


def _check_strangers(folder: Path) -> None:
    """Refuse a directory that is not wholly a run's: ``--force`` is for what runs made.

    Raises:
        UsageError: names the first thing that is not a run's.
    """
    found = sorted(path.name for path in folder.iterdir()) if files.present(folder) else []
    ours = is_ours(folder / RUN, "vtw-run")
    for name in found:
        if not is_run_file(name) or not (ours or staging.is_stage(name) or name == LOCK):
            why = f"which vtw run did not make{'' if ours else f', and no {RUN}'}"
            raise UsageError(
                f"{folder} holds {name}, {why}, so --force does not replace what is there",
                "choose another --output, or run steps again with --from STEP",
            )
