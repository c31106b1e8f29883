"""Runs a recipe's steps in one directory: what is still valid is kept, the rest runs, a failed gate stops the export.

Steps are ``calibrate``, ``analyze``, ``eval`` and ``export``, in this order; a step belongs to a recipe that has its
section. ``run.json`` in the directory remembers for each finished step the digests of its inputs and of its files.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from vtwcli import console, documents, files, gates
from vtwcli.distributed import is_main
from vtwcli.errors import UsageError, VtwError
from vtwcli.fingerprint import data_records, digest, file_digest, model_record, place
from vtwcli.provenance import versions
from vtwcli.recipe import STEPS, Recipe, Section
from vtwcli.schedules import schedule_of
from vtwcli.steps import FILES, RUNNERS, steps_of

if TYPE_CHECKING:
    from vtwcli.analyze import Analysis

FORMAT_VERSION: Literal[1] = 1
KEPT = "nothing changed"
RUN, RECIPE, SUMMARY = "run.json", "recipe.yaml", "summary.md"


class Record(Section):
    """A finished step in ``run.json``.

    Attributes:
        inputs: digests by kind: ``options``, ``model``, ``data``, ``tool``, and ``after``, the steps that it follows.
        files: SHA-256 of what it wrote, by name in the output directory.
        seconds: how long it took.
        words: what came out, in a line.
        result: the few values behind it.
    """

    inputs: dict[str, str]
    files: dict[str, str]
    seconds: float
    words: str
    result: dict[str, Any]


class _RunFile(Section):
    """The parts of ``run.json`` that a later run reads."""

    model_config = Section.model_config | {"extra": "ignore"}

    format: Literal["vtw-run"]
    format_version: Literal[1]
    started: tuple[str, ...] = ()
    steps: dict[str, Record] = Field(default_factory=dict)


@dataclass(frozen=True)
class Planned:
    """A step of a run.

    Attributes:
        name: of ``STEPS``.
        inputs: digests, as in ``Record``.
        runs: whether it runs; else its kept result is taken.
        why: in a few words.
    """

    name: str
    inputs: dict[str, str]
    runs: bool
    why: str

    @property
    def kept(self) -> bool:
        """Whether a valid result of an earlier run is taken."""
        return self.why == KEPT


@dataclass
class Run:
    """A recipe, where its results are, and what is known of them.

    Attributes:
        recipe: what to do.
        folder: the output directory.
        text: the recipe's file as it is written, for the export's record.
        model: ``fingerprint.model_record``.
        steps: the plan, in order.
        records: finished steps, of this run and of earlier ones.
        started: steps that were begun and did not finish; what they left behind may be replaced.
        results: result documents at hand, by step.
        analysis: the profile, where calibration made it in the same sweep.
        reached: steps of this run that ran or were kept, up to where it stopped.
        gates: judged gates of this run.
        failure: why the run stopped short, or None.
        finished: whether it came to its end; ``passed`` in its document is null until then.
    """

    recipe: Recipe
    folder: Path
    text: str | None
    model: dict[str, Any]
    steps: list[Planned]
    records: dict[str, Record]
    started: set[str]
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    analysis: Analysis | None = None
    reached: set[str] = field(default_factory=set)
    gates: list[dict[str, Any]] = field(default_factory=list)
    failure: str | None = None
    finished: bool = False

    def document(self) -> dict[str, Any]:
        """The content of ``run.json``."""
        return {
            "format": "vtw-run",
            "format_version": FORMAT_VERSION,
            "recipe": resolved(self.recipe, self.folder),
            "model": self.model,
            "plan": [{"step": one.name, "runs": one.runs, "why": one.why} for one in self.steps],
            "started": sorted(self.started),
            "steps": {name: self.records[name].model_dump() for name in STEPS if name in self.records},
            "gates": self.gates,
            "passed": None if self.failure is None and not self.finished else self.failure is None,
            "failure": self.failure,
            "versions": versions(),
        }

    def path(self, step: str, kind: str = "result") -> Path:
        """Where a step's file is."""
        return self.folder / FILES[step][kind]

    def result(self, step: str) -> dict[str, Any] | None:
        """A step's result document, if the recipe has the step."""
        if step not in self.results and any(one.name == step for one in self.steps):
            self.results[step] = json.loads(self.path(step).read_text(encoding="utf-8"))
        return self.results.get(step)


def prepare(
    recipe: Recipe,
    folder: Path,
    *,
    text: str | None = None,
    only: Collection[str] = (),
    start: str | None = None,
    force: bool = False,
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
        force: run every step, and replace files that are in the way.

    Raises:
        UsageError: nothing to run, a step that is not there, or a file that the run did not write is in its way.
        NotFoundError: model or data missing or unreadable.
    """
    names = steps_of(recipe)
    for name in [*only, *([] if start is None else [start])]:
        if name not in names:
            near = documents.nearest(name, names)
            raise UsageError(
                f"{name!r} is not a step of this recipe",
                f"did you mean {near!r}?" if near else f"its steps: {', '.join(names)}",
            )
    if recipe.model.name != "demo" and (folder / "model").resolve() == Path(recipe.model.name).resolve():
        raise UsageError(f"{folder / 'model'} holds the model itself", "choose another output directory")
    records, started = _read_run(folder, force)
    model = model_record(recipe.model)
    data: dict[str, str] = {}
    inputs: dict[str, dict[str, str]] = {}
    for name in names:
        inputs[name] = _inputs(recipe, folder, name, model, inputs, data)
    steps: list[Planned] = []
    first = names.index(start) if start is not None else len(names)
    for i, name in enumerate(names):
        stale = _stale(folder, name, inputs[name], records.get(name))
        if only and name not in only:
            if stale and any(name in STEPS[one] for one in only):
                raise UsageError(
                    f"{name} has no valid result ({stale})", f"leave out --only, or --only {name} too"
                )
            steps.append(Planned(name, inputs[name], False, "not asked for" if stale else KEPT))
        elif force or i >= first or name in only:
            steps.append(Planned(name, inputs[name], True, stale or "asked for"))
        else:
            steps.append(Planned(name, inputs[name], bool(stale), stale or KEPT))
    if not force:
        _check_way(folder, [one.name for one in steps if one.runs and one.name not in started], records)
    return Run(recipe, folder, text, model, steps, records, started)


def execute(run: Run) -> dict[str, Any]:
    """Run what ``prepare`` planned and write the results.

    Returns:
        The run's document. ``passed`` is False, and ``failure`` says why, when no layer qualified or a gate failed;
        then no later step ran and nothing was exported.

    Raises:
        VtwError: a step failed otherwise. Steps that finished before it are kept.
    """
    if is_main():
        files.write_text(run.folder / RECIPE, documents.to_yaml(resolved(run.recipe, run.folder)))
    total = len(run.steps)
    for number, step in enumerate(run.steps, 1):
        if run.failure is not None:
            console.note(f"[{number}/{total}] {step.name}: not run")
            continue
        if step.runs or step.kept:
            run.reached.add(step.name)
        if step.runs:
            _run_step(run, step)
            how = f"{run.records[step.name].seconds:.1f} s"
        elif step.kept:
            how = "kept"
        else:
            continue
        console.note(f"[{number}/{total}] {step.name}: {run.records[step.name].words} ({how})")
        _judge(run, step.name)
    run.finished = True
    _save(run)
    return run.document()


def _run_step(run: Run, step: Planned) -> None:
    """Run a step and keep its record; until it has finished, its files belong to nobody's result."""
    run.records.pop(step.name, None)
    run.started.add(step.name)
    _save(run)
    if is_main():  # not every result has a schedule, and an old one would pass for its
        for file in FILES[step.name].values():
            if file.endswith(".yaml"):
                (run.folder / file).unlink(missing_ok=True)
    began = time.perf_counter()
    try:
        result = RUNNERS[step.name](run)
    except BaseException as error:  # whatever ends the run, its file and its summary say so
        run.failure = f"{step.name}: {_reason(error)}"
        _save(run)
        raise
    written = [run.folder / file for file in FILES[step.name].values() if is_main()]
    digests = {str(file.relative_to(run.folder)): file_digest(file) for file in written if file.is_file()}
    seconds = round(time.perf_counter() - began, 3)
    words = result.pop("words")
    run.records[step.name] = Record(
        inputs=step.inputs, files=digests, seconds=seconds, words=words, result=result
    )
    run.started.discard(step.name)
    _save(run)


def _reason(error: BaseException) -> str:
    if isinstance(error, VtwError):
        return error.message
    return "interrupted" if isinstance(error, KeyboardInterrupt | SystemExit) else type(error).__name__


def _save(run: Run) -> None:
    if is_main():
        files.write_text(run.folder / RUN, files.document(run.document()))


def resolved(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """The recipe with every value that holds, for the sections that it has; paths are relative to ``folder``."""

    data = {
        name: value.model_dump(mode="json", exclude_none=True) if isinstance(value, Section) else value
        for name, value in recipe
        if name in recipe.model_fields_set and name not in ("data", "output")
    }
    data["model"] = recipe.model.model_dump(mode="json", exclude_none=True) | {
        "name": place(recipe.model.name, folder)
    }
    if recipe.schedule.file is not None:
        data["schedule"]["file"] = place(recipe.schedule.file, folder)
    if recipe.data:
        data["data"] = [
            spec.model_dump(mode="json", exclude_defaults=True) | {"source": place(spec.source, folder)}
            for spec in recipe.data
        ]
    data["output"] = "."
    order = list(Recipe.model_fields)
    return {name: data[name] for name in sorted(data, key=order.index)}


def _inputs(
    recipe: Recipe,
    folder: Path,
    name: str,
    model: dict[str, Any],
    earlier: Mapping[str, dict[str, str]],
    data: dict[str, str],
) -> dict[str, str]:
    """The digests of what a step depends on."""
    section = getattr(recipe, name)
    options: list[Any] = [section.model_dump(mode="json", exclude={"resume"})]
    if name in ("eval", "export") and recipe.schedule.names_one:
        named = schedule_of(recipe.schedule)
        options.append(named[1].to_dict() if named else None)
    if name == "calibrate" and recipe.calibrate.method != "vtw":
        options.append(recipe.schedule.model_dump(mode="json"))  # the parameters that it does not search
    found = {
        "options": digest(options),
        "model": digest(
            [model["fingerprint"], recipe.model.model_dump() | {"name": place(recipe.model.name, folder)}]
        ),
        "tool": digest(versions()),
        "after": digest([earlier.get(one) for one in STEPS[name]]),
    }
    if name != "export":
        found["data"] = _data(recipe, folder, section, data)
    return found


def _data(recipe: Recipe, folder: Path, section: Any, known: dict[str, str]) -> str:
    from vtwcli.data.tasks import default_mix
    from vtwcli.recipe import DataSpec

    specs = list(recipe.data) or (
        [DataSpec(source="demo")] if recipe.model.name == "demo" else list(default_mix())
    )
    choice = (section.limit, section.seed, section.skip_bad)
    if str(choice) not in known:  # steps that take the same samples read them once
        records = data_records(specs, limit=choice[0], seed=choice[1], skip_bad=choice[2])
        for record in records:
            record.pop("path", None)
        plain = [spec.model_dump(mode="json") | {"source": place(spec.source, folder)} for spec in specs]
        known[str(choice)] = digest([plain, [record | {"source": None} for record in records]])
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


def _check_way(folder: Path, names: Collection[str], records: Mapping[str, Record]) -> None:
    """Refuse to replace what no run wrote, or what somebody changed since.

    Raises:
        UsageError: a file in the way.
    """
    hint = "choose another --output, or --force to replace it"
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} exists and is not a directory", "choose another --output")
    if not (folder / RUN).exists():
        for name in (RECIPE, SUMMARY):
            if (folder / name).exists():
                raise UsageError(f"{folder / name} exists already", hint)
    for record in records.values():
        for file, known in record.files.items():
            path = folder / file
            if path.is_file() and file_digest(path) != known:
                raise UsageError(f"{path} was changed since vtw run wrote it", hint)
    for name in names:
        ours = records[name].files if name in records else {}
        for file in FILES[name].values():
            top = Path(file).parts[0]
            if file not in ours and (folder / top).exists():
                raise UsageError(f"{folder / top} exists already", hint)


def _read_run(folder: Path, force: bool) -> tuple[dict[str, Record], set[str]]:
    """Finished and begun steps of earlier runs in a directory."""
    path = folder / RUN
    if not path.exists():
        return {}, set()
    try:
        found = documents.load(path, _RunFile, "run file")
    except UsageError:
        if force:
            return {}, set()
        raise
    return {name: record for name, record in found.steps.items() if name in STEPS}, set(found.started)


def _judge(run: Run, name: str) -> None:
    """Note why the run must stop behind a step, if it must."""
    if name == "calibrate" and not run.recipe.schedule.names_one:
        calibration = run.result("calibrate")
        if calibration is not None and calibration["schedule"] is None:
            run.failure = run.records[name].words.rstrip(".")
    if name == "eval":
        evaluation = run.result("eval")
        assert evaluation is not None
        run.gates = gates.check(evaluation["schedules"], run.recipe.gates)
        failed = [gate for gate in run.gates if not gate["passed"]]
        if failed:
            run.failure = gates.sentence(failed[0])

