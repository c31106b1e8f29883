"""A run of a recipe: its plan, what is known of its steps, and ``run.json``, which remembers it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from vtwcli.data.spec import is_path
from vtwcli.errors import UsageError
from vtwcli.io import documents, files, staging
from vtwcli.io.outputs import is_ours
from vtwcli.io.section import Section
from vtwcli.machine.distributed import is_main
from vtwcli.machine.libraries import versions
from vtwcli.recipe.recipe import STEPS, Recipe

if TYPE_CHECKING:
    from vtwcli.analyze import Analysis

# what each step writes, by the name under which its writer knows it; a directory stands for its manifest
FILES: dict[str, dict[str, str]] = {
    "calibrate": {
        "result": "calibration.json",
        "schedule": "calibration.schedule.yaml",
        "plot": "calibration.png",
    },
    "analyze": {
        "result": "analysis.json",
        "page": "analysis.html",
        "static": "analysis.static.yaml",
        "dynamic": "analysis.dynamic.yaml",
        "kl": "analysis.kl.png",
        "attention": "analysis.attention.png",
        "tokens": "analysis.tokens.png",
        "values": "analysis.values.png",
    },
    "eval": {
        "result": "evaluation.json",
        "markdown": "evaluation.md",
        "page": "evaluation.html",
        "plot": "evaluation.png",
    },
    "export": {"model": "model/manifest.json"},
}

FORMAT_VERSION: Literal[1] = 1
KEPT = "nothing changed"
RUN, RECIPE, SUMMARY, LOCK = "run.json", "recipe.yaml", "summary.md", ".vtw-run.lock"
STATES = {"calibrate": "calibration.partial.jsonl", "eval": "evaluation.partial.jsonl"}
"""Where finished samples of an interrupted step are kept."""


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


def is_run_file(name: str) -> bool:
    """Whether a run may have made a file or directory of this name at the top of its output directory."""
    names = {
        RUN,
        RECIPE,
        SUMMARY,
        LOCK,
        *(Path(file).parts[0] for step in FILES.values() for file in step.values()),
    }
    partial = any(re.fullmatch(rf"\.{re.escape(state)}\.\d+", name) for state in STATES.values())
    return name in names or partial or staging.is_stage(name)


@contextmanager
def alone(run: Run) -> Iterator[None]:
    """Keep other runs out of the output directory.

    Raises:
        UsageError: another run is at work there, or was since this one was planned.
    """
    if not is_main():
        yield
        return
    busy = UsageError(
        f"another vtw run is at work in {run.folder}", "wait until it is done, or choose another --output"
    )
    with ExitStack() as stack:
        try:
            stack.enter_context(staging.claimed(run.folder / LOCK, busy))
        except OSError as error:
            raise files.cannot_write(run.folder, error) from None
        if staging.signature(run.folder / RUN) != run.seen:
            raise UsageError(
                f"another vtw run has changed {run.folder} meanwhile", "run again to go on from there"
            )
        staging.sweep(run.folder / RUN, everything=True)
        yield


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
        file: the recipe's file, which is never written.
        owned: files in the output directory that an earlier run wrote, or that may be replaced as if it had.
        seen: which ``run.json`` the plan was made from.
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
    file: Path | None = None
    owned: frozenset[Path] = frozenset()
    seen: staging.Signature | None = None
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


def save(run: Run) -> None:
    """Write ``run.json``; one process of several does."""
    if is_main():
        files.write_text(run.folder / RUN, files.document(run.document()))


def resolved(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """The recipe with every value that holds, for the sections that it has; paths are relative to ``folder``."""
    recipe = seen_from(recipe, folder)
    data: dict[str, Any] = {"model": recipe.model.model_dump(mode="json", exclude_none=True)}
    for name in Recipe.model_fields:
        section = getattr(recipe, name)
        if name == "data" and recipe.data:
            data["data"] = [spec.model_dump(mode="json", exclude_defaults=True) for spec in recipe.data]
        elif name in recipe.model_fields_set and isinstance(section, Section):
            data[name] = section.model_dump(mode="json", exclude_none=True)
    return data | {"output": "."}


def seen_from(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with the paths that exist as seen from ``folder``, wherever the command is called."""
    return recipe.with_paths(lambda name: os.path.relpath(name, folder) if is_path(name) else name)


def read_run(folder: Path, force: bool) -> tuple[dict[str, Record], set[str]]:
    """Finished and begun steps of earlier runs in a directory.

    Raises:
        UsageError: a run file that cannot be read; with ``force`` one of another version has nothing to say.
    """
    path = folder / RUN
    if not path.exists():
        return {}, set()
    try:
        found = documents.load(path, _RunFile, "run file")
    except UsageError:
        if force and is_ours(path, "vtw-run"):
            return {}, set()
        raise
    return {name: record for name, record in found.steps.items() if name in STEPS}, set(found.started)
