"""What the subcommands make of their flags: the recipe below them, what is read, and where results go.

Here ``given`` holds the value of every flag of the command by its name, as ``vtwcli.commands.flags`` declares them;
flags that a command does not have may be missing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from vtwcli.data.spec import DataSpec
from vtwcli.errors import UsageError
from vtwcli.io import console
from vtwcli.io.files import document, present
from vtwcli.io.outputs import Inputs, Outputs, inputs_of
from vtwcli.io.track import check_tracker, track
from vtwcli.models.names import directory_of
from vtwcli.recipe.recipe import ModelSection, Recipe
from vtwcli.recipe.settings import section_of
from vtwcli.results.document import Files

T = TypeVar("T")


def begin(given: dict[str, Any]) -> None:
    """Set how much is said: nothing but results under ``--quiet`` and on all ranks but the first."""
    from vtwcli.machine import distributed

    console.settings.quiet = given["quiet"] or not distributed.is_main()
    console.settings.verbose = given["verbose"]
    if given.get("track") is not None:
        check_tracker(given["track"])
    hint = ": --resume would have kept finished samples" if given.get("resume", True) is None else ""
    console.settings.kept = lambda: f"nothing half-made is left{hint}"


def recipe_of(given: dict[str, Any], method: str | None = None) -> Recipe:
    """The recipe that a command's own options are laid over: ``--recipe``, the environment and ``--set``.

    Args:
        method: of the schedule that the command runs, so that ``--set`` may hold its parameters.
    """
    import os

    from vtwcli.recipe.settings import load_recipe

    trusted = bool(given.get("trust_remote_code"))
    return load_recipe(given.get("recipe"), given.get("set") or (), os.environ, trusted, method)


def model_of(given: dict[str, Any], recipe: Recipe) -> ModelSection:
    """Which model and where it runs; MODEL may come from the recipe."""
    if given.get("model") is None and "name" not in recipe.model.model_fields_set:
        raise UsageError("no model given", "name a directory, a Hub id or demo, or a recipe that does")
    section: ModelSection = section_of(ModelSection, {**given, "name": given.get("model")}, recipe.model)
    directory_of(section.name)  # what is not there is said before torch is imported
    return section


def data_of(given: dict[str, Any], recipe: Recipe) -> list[DataSpec]:
    """The data sources of ``--data``, or those of the recipe.

    Raises:
        NotFoundError: one is on this machine by its name, and is not there.
    """
    from vtwcli.data.sources import place

    specs = recipe.sources([DataSpec.parse(text) for text in given.get("data") or ()])
    for spec in specs:
        place(spec)
    return specs


def output_paths(given: dict[str, Any], model: str, files: Files) -> Outputs:
    """Where the result and the files beside it go; nowhere under ``--json`` without ``--output``.

    Args:
        given: ``output``, ``json`` and ``force``; ``plot`` and ``trace`` are those files' own places.
        model: whose name the directory bears by default.
        files: of the result.

    Raises:
        UsageError: ``plot`` has a suffix of no picture.
    """
    output, plot = given["output"], given.get("plot")
    if plot is not None and plot.suffix not in (".png", ".svg", ".pdf"):
        raise UsageError(f"--plot: {plot} must end in .png, .svg or .pdf")
    if output is None and not given["json"]:
        slug = model.rstrip("/").replace("@", "-").rsplit("/", 1)[-1] or "model"
        output = Path(f"vtw-{slug}") / files.named()["result"]
    places = {"result": output}
    places |= {key: output and _beside(output, suffix) for key, suffix in files.beside.items()}
    named = {key: given[key] for key in ("plot", "trace") if given.get(key) is not None}
    return Outputs(places | named, files.format, given["force"])


def _beside(output: Path, suffix: str) -> Path:
    if not output.name:
        raise UsageError(f"{output} is a directory, not a file")
    return output.with_suffix(suffix)


def inputs_here(
    given: dict[str, Any], recipe: Recipe, model: ModelSection, data: Sequence[DataSpec]
) -> Inputs:
    """What a command reads from this machine; none of it may be where it writes.

    Args:
        given: the options; files among them are inputs too.
        recipe, model, data: what comes of the options and the recipe.
    """
    specs = [name for spec in data for name in (spec.source, spec.path)]
    named = ("recipe", "schedule", "calibration", "evaluation")
    return inputs_of(
        {"the model": model.name, "the baseline": given.get("baseline") or recipe.eval.baseline}
        | {f"the {name}": given.get(name) for name in named}
        | {"the recipe's schedule": recipe.schedule.file, "the data": specs}
    )


def state_beside(result: Path | None, resume: bool) -> Path | None:
    """Where finished samples are kept under ``--resume``; None without it.

    Raises:
        UsageError: there is no result file that they could lie beside.
    """
    if resume and result is None:
        raise UsageError(
            "--resume: there is no result file to keep finished samples beside", "give --output FILE"
        )
    if not resume or result is None:
        return None
    state = result.with_suffix(".partial.jsonl")
    present(state.with_name(f".{state.name}.{0:03}"))  # a name that no file can have
    console.settings.kept = lambda: (
        f"finished samples are kept in {state}: the same command goes on from them"
        if state.exists()
        else "no sample was finished"
    )
    return state


def show(
    result: T,
    view: Callable[[T], Any],
    outputs: Outputs,
    given: dict[str, Any],
) -> None:
    """Print a result that is written already: the document, or what ``view`` makes of it; then name the files.

    Args:
        given: ``json``, and ``track`` where the result goes to a tracker too.
    """
    as_json = given["json"]
    if as_json:
        console.result_text(document(result))
    else:
        console.result(view(result))
    paths = [str(path) for path in outputs.values() if path and path.exists()]
    if paths:
        console.note("wrote " + ", ".join(paths))
    elif as_json:
        console.note("no files written: --json without --output only prints")
    if given.get("track") is not None:
        track(given["track"], cast(Mapping[str, Any], result))
