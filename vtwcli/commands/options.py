"""What the subcommands share: options, the recipe below them, and where their results go.

Options default to None; their one default lives in ``vtwcli.recipe.recipe`` and the help pages read it from there.
Nothing heavy is imported at the top: ``vtw --help`` must answer at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from vtwcli.data.spec import DataSpec
from vtwcli.errors import UsageError
from vtwcli.io import console
from vtwcli.io.files import document, present
from vtwcli.io.outputs import Inputs, Outputs, inputs_of
from vtwcli.io.section import Section
from vtwcli.recipe.recipe import ModelSection, Recipe, ScheduleSection
from vtwcli.recipe.settings import section_of
from vtwcli.results.document import Files

T = TypeVar("T")


def option(section: type[Section], field: str, *names: str, **extra: Any) -> Any:
    """A command-line option whose help and shown default come from the recipe's field."""
    info = section.model_fields[field]
    text = info.description or ""
    if info.default is not None and info.default is not False:
        default = info.default
        if isinstance(default, tuple):  # written as it is given
            default = ",".join(map(str, default))
        text += f" [dim]\\[default: {default}][/dim]"
    return typer.Option(*names, help=text, show_default=False, **extra)


def recipe_of(given: dict[str, Any]) -> Recipe:
    """The recipe that a command's own options are laid over: ``--recipe``, the environment and ``--set``."""
    import os

    from vtwcli.recipe.settings import load_recipe

    trusted = bool(given.get("trust_remote_code"))
    # calibrate's --method is an option of its own section
    method = given.get("method") if "shallow_mid_layer" in given else None
    return load_recipe(given.get("recipe"), given.get("sets") or (), os.environ, trusted, method)


def model_of(given: dict[str, Any], recipe: Recipe) -> ModelSection:
    """Which model and where it runs; MODEL may come from the recipe."""
    if given.get("model") is None and "name" not in recipe.model.model_fields_set:
        raise UsageError("no model given", "name a directory, a Hub id or demo, or a recipe that does")
    section: ModelSection = section_of(ModelSection, {**given, "name": given.get("model")}, recipe.model)
    return section


def data_of(given: dict[str, Any], recipe: Recipe) -> list[DataSpec]:
    """The data sources of ``--data``, or those of the recipe."""
    return [DataSpec.parse(text) for text in given.get("data") or ()] or list(recipe.data)


def begin(quiet: bool, verbose: bool) -> None:
    from vtwcli.machine import distributed

    console.settings.quiet = quiet or not distributed.is_main()
    console.settings.verbose = verbose


def output_paths(
    model: str,
    output: Path | None,
    as_json: bool,
    files: Files,
    plot: Path | None = None,
    force: bool = False,
    trace: Path | None = None,
) -> Outputs:
    """Where the result and the files beside it go; nowhere under ``--json`` without ``--output``.

    Raises:
        UsageError: ``plot``, the picture's own place, has a suffix of no picture.
    """
    if plot is not None and plot.suffix not in (".png", ".svg", ".pdf"):
        raise UsageError(f"--plot: {plot} must end in .png, .svg or .pdf")
    if output is None and not as_json:
        slug = model.rstrip("/").replace("@", "-").rsplit("/", 1)[-1] or "model"
        output = Path(f"vtw-{slug}") / files.named()["result"]
    places = {
        "result": output,
        **{key: _beside(output, suffix) if output else None for key, suffix in files.beside.items()},
        **({} if plot is None else {"plot": plot}),
        **({} if trace is None else {"trace": trace}),
    }
    return Outputs(places, files.format, force)


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
    return state


def show(
    result: T,
    view: Callable[[T], Any],
    outputs: Outputs,
    as_json: bool,
) -> None:
    """Print a result that is written already: the document, or what ``view`` makes of it; then name the files."""
    if as_json:
        console.result_text(document(result))
    else:
        console.result(view(result))
    _tell_written(outputs)


def _tell_written(outputs: Outputs) -> None:
    paths = [str(path) for path in outputs.values() if path and path.exists()]
    if paths:
        console.note("wrote " + ", ".join(paths))


ModelName = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL", help="Local directory, Hub id with optional @revision, or demo.", show_default=False
    ),
]
RecipeFile = Annotated[
    Path | None,
    typer.Option("--recipe", metavar="FILE", help="Recipe whose values the options here override."),
]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe key, e.g. calibrate.eta=1e-4."),
]
Device = Annotated[str | None, option(ModelSection, "device", "--device", rich_help_panel="Model")]
Dtype = Annotated[str | None, option(ModelSection, "dtype", "--dtype", rich_help_panel="Model")]
Attn = Annotated[str | None, option(ModelSection, "attn", "--attn", rich_help_panel="Model")]
Trust = Annotated[
    bool | None,
    option(ModelSection, "trust_remote_code", "--trust-remote-code", rich_help_panel="Model"),
]
Stream = Annotated[
    bool | None, option(ModelSection, "stream", "--stream/--no-stream", rich_help_panel="Model")
]
Data = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        metavar="SOURCE[:KEY=VALUE,...]",
        help="Where samples come from; may be given several times. demo, a built-in task (scienceqa, ai2d, mmmu, "
        "gqa, textvqa, pope, flickr30k, ocrbench), a local file or directory, or a Hub data set. "
        "By default demo for the demo model, else scienceqa, gqa, ocrbench and flickr30k.",
        rich_help_panel="Data",
    ),
]
Method = Annotated[str | None, option(ScheduleSection, "method", "--method", rich_help_panel="Method")]
ShallowMidLayer = Annotated[
    int | None,
    option(ScheduleSection, "shallow_mid_layer", "--shallow-mid-layer", rich_help_panel="Method"),
]
LayerThreshold = Annotated[
    float | None, option(ScheduleSection, "layer_threshold", "--layer-threshold", rich_help_panel="Method")
]
TokensThreshold = Annotated[
    float | None, option(ScheduleSection, "tokens_threshold", "--tokens-threshold", rich_help_panel="Method")
]
ExitThreshold = Annotated[
    float | None, option(ScheduleSection, "exit_threshold", "--exit-threshold", rich_help_panel="Method")
]
ExitLayers = Annotated[
    int | None, option(ScheduleSection, "exit_layers", "--exit-layers", rich_help_panel="Method")
]
Consecutive = Annotated[
    bool | None, option(ScheduleSection, "consecutive", "--consecutive", rich_help_panel="Method")
]
Layer0 = Annotated[str | None, option(ScheduleSection, "layer0", "--layer0", rich_help_panel="Method")]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="PATH", help="Result file.", rich_help_panel="Output")
]
Json = Annotated[
    bool, typer.Option("--json", help="Print the result as JSON on stdout.", rich_help_panel="Output")
]
Force = Annotated[
    bool, typer.Option("--force", help="Replace what vtw wrote before.", rich_help_panel="Output")
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="No progress, no notes.", rich_help_panel="Output")
]
Verbose = Annotated[
    bool,
    typer.Option("--verbose", "-v", help="More words; tracebacks on failure.", rich_help_panel="Output"),
]
