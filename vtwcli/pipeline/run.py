"""What a step is, and a run of steps: its plan, what is known of them, and ``run.json``, which remembers it."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from pydantic import Field

from vtwcli.data.spec import is_path
from vtwcli.errors import UsageError
from vtwcli.io import documents, files, staging
from vtwcli.io.outputs import Inputs, Outputs, is_ours
from vtwcli.io.section import Section
from vtwcli.machine.distributed import is_main
from vtwcli.machine.libraries import versions
from vtwcli.recipe.recipe import STEPS, Recipe

if TYPE_CHECKING:
    from vtwcli.analyze import Analysis
    from vtwcli.results.evaluation import Gate

FORMAT_VERSION: Literal[1] = 1
KEPT = "nothing changed"
RUN, RECIPE, SUMMARY, LOCK = "run.json", "recipe.yaml", "summary.md", ".vtw-run.lock"


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


class Outcome(NamedTuple):
    """What came out of a step: in a line, and the few values behind it that ``run.json`` keeps."""

    words: str
    values: dict[str, Any]


class Step(ABC):
    """A section of the recipe that is worked through; all that the pipeline knows of it.

    Attributes:
        name: of its section.
        follows: the steps whose results it uses, where the recipe has them.
        writes: its files, by the name under which its writer knows it; a directory stands for its manifest.
        kind: the ``format`` of its result document.
        partial: names the files that keep finished samples across an interruption; None where nothing does.
        reads_data: whether its result depends on the recipe's data.
    """

    name: ClassVar[str]
    follows: ClassVar[tuple[str, ...]] = ()
    writes: ClassVar[Mapping[str, str]]
    kind: ClassVar[str]
    partial: ClassVar[str | None] = None
    reads_data: ClassVar[bool] = True

    def lacks(self, recipe: Recipe) -> tuple[str, str] | None:
        """Why a recipe with its section cannot run it, and what to do; None where it can."""
        return None

    def depends(self, recipe: Recipe, placed: Recipe) -> list[Any]:
        """What its result depends on in the recipe besides its own section, the model and the data; JSON values.

        Args:
            recipe: as loaded, to open files.
            placed: with paths as seen from the output directory, to tell them.
        """
        return []

    def other_models(self, recipe: Recipe) -> list[str]:
        """Models that it reads besides the recipe's own."""
        return []

    @abstractmethod
    def run(self, run: Run) -> Outcome:
        """Do the work and write the files."""

    def judge(self, run: Run) -> str | None:
        """Why the run must stop behind this step, whose result is there; None where it goes on."""
        return None

    def shown(self, recipe: Recipe) -> dict[str, Any]:
        """The options that the recipe sets, for the plan."""
        section: Section = getattr(recipe, self.name)
        return section.model_dump(mode="json", exclude_defaults=True)

    def page(self, run: Run) -> str | None:
        """What the summary shows of its result beside a line, in Markdown."""
        return None

    def outputs(self, folder: Path, owned: Collection[Path]) -> Outputs:
        """Where its files go in an output directory; those that are ``owned`` may be replaced."""
        places = {key: folder / file for key, file in self.writes.items()}
        return Outputs(places, self.kind, force=True, owned=owned)

    def check_way(self, folder: Path, owned: Collection[Path], ours: bool, inputs: Inputs, hint: str) -> None:
        """Refuse, before the run, what stands in the way of its files.

        Args:
            folder: the output directory.
            owned: files that an earlier run wrote.
            ours: whatever this tool wrote may be replaced.
            inputs: what the run reads.
            hint: what to do.

        Raises:
            UsageError: it is none of a run's, an input, or cannot be written.
        """
        outputs = self.outputs(folder, owned)
        for made in outputs.values():
            if not ours and made is not None and made not in owned and files.present(made):
                raise UsageError(f"{made} exists already", hint)
        outputs.check(inputs)


@dataclass(frozen=True)
class Planned:
    """A step of a run.

    Attributes:
        step: what it does.
        inputs: digests, as in ``Record``.
        runs: whether it runs; else its kept result is taken.
        why: in a few words.
    """

    step: Step
    inputs: dict[str, str]
    runs: bool
    why: str

    @property
    def name(self) -> str:
        """Of the step."""
        return self.step.name

    @property
    def kept(self) -> bool:
        """Whether a valid result of an earlier run is taken."""
        return self.why == KEPT


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
    results: dict[str, Any] = field(default_factory=dict)
    analysis: Analysis | None = None
    reached: set[str] = field(default_factory=set)
    gates: list[Gate] = field(default_factory=list)
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

    def result(self, step: str) -> Any:
        """A step's result document; None where the recipe has no such step."""
        for one in self.steps:
            if one.name == step and step not in self.results:
                file = self.folder / one.step.writes["result"]
                self.results[step] = json.loads(file.read_text(encoding="utf-8"))
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
