"""The ``vtw`` command: each subcommand parses, calls one library function and prints.

Nothing heavy is imported at the top: ``vtw --help`` must answer at once. Options default to None here; their one
default lives in ``vtwcli.recipe`` and the help pages read it from there.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from vtwcli import __version__, console
from vtwcli.errors import GateError, UsageError, VtwError
from vtwcli.recipe import CalibrateSection, DataSpec, ModelSection, Recipe, Section

app = typer.Typer(
    name="vtw",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Find the layer from which a multimodal LLM no longer needs its visual tokens, and ship it without them.",
    epilog="Start here:  vtw calibrate demo",
)


def main() -> None:
    """Run the command line; every expected failure is one line on stderr and its exit code."""
    try:
        app()
    except VtwError as error:
        console.error(error.message, error.hint)
        sys.exit(error.exit_code)
    except Exception as error:
        if console.settings.verbose:
            raise
        name = type(error).__name__
        console.error(f"unexpected failure: {name}: {' '.join(str(error).split())}", "--verbose shows where")
        sys.exit(1)


def _option(section: type[Section], field: str, *names: str, **extra: Any) -> Any:
    """A command-line option whose help and shown default come from the recipe's field."""
    info = section.model_fields[field]
    text = info.description or ""
    if info.default is not None and info.default is not False:
        text += f" [dim]\\[default: {info.default}][/dim]"
    return typer.Option(*names, help=text, show_default=False, **extra)


def _recipe(given: dict[str, Any]) -> Recipe:
    """The recipe that a command's own options are laid over: ``--recipe``, the environment and ``--set``."""
    import os

    from vtwcli.settings import load_recipe

    return load_recipe(given.get("recipe"), given.get("sets") or (), os.environ)


def _section(section: type[Section], given: dict[str, Any], base: Section) -> Any:
    """A recipe section with those of the command's options laid over it that were given (not None)."""
    options = {key: given[key] for key in section.model_fields if given.get(key) is not None}
    try:
        return section.model_validate(base.model_dump(exclude_unset=True) | options)
    except ValidationError as error:
        first = error.errors()[0]
        option = "--" + str(first["loc"][0]).replace("_", "-") if first["loc"] else "options"
        message = first["msg"].removeprefix("Value error, ")
        raise UsageError(f"{option}: {message[:1].lower()}{message[1:]}, got {first['input']!r}") from None


def _model(given: dict[str, Any], recipe: Recipe) -> ModelSection:
    """Which model and where it runs; MODEL may come from the recipe."""
    if given.get("model") is None and "name" not in recipe.model.model_fields_set:
        raise UsageError("no model given", "name a directory, a Hub id or demo, or a recipe that does")
    section: ModelSection = _section(ModelSection, {**given, "name": given.get("model")}, recipe.model)
    return section


def _data(given: dict[str, Any], recipe: Recipe) -> list[DataSpec]:
    """The data sources of ``--data``, or those of the recipe."""
    return [DataSpec.parse(text) for text in given.get("data") or ()] or list(recipe.data)


def _version(value: bool) -> None:
    if value:
        console.result_text(f"vtw {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


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
Device = Annotated[str | None, _option(ModelSection, "device", "--device", rich_help_panel="Model")]
Dtype = Annotated[str | None, _option(ModelSection, "dtype", "--dtype", rich_help_panel="Model")]
Attn = Annotated[str | None, _option(ModelSection, "attn", "--attn", rich_help_panel="Model")]
Trust = Annotated[
    bool | None,
    _option(ModelSection, "trust_remote_code", "--trust-remote-code", rich_help_panel="Model"),
]
Stream = Annotated[
    bool | None, _option(ModelSection, "stream", "--stream/--no-stream", rich_help_panel="Model")
]
Data = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        metavar="SOURCE[:KEY=VALUE,...]",
        help="Where samples come from; may be given several times. demo, a built-in task (scienceqa, ai2d, mmmu, "
        "gqa, textvqa, pope, flickr30k, ocrbench), a local file or directory, or a Hub data set. "
        "By default demo for the demo model, else scienceqa, textvqa, ocrbench and flickr30k.",
        rich_help_panel="Data",
    ),
]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="PATH", help="Result file.", rich_help_panel="Output")
]
Json = Annotated[
    bool, typer.Option("--json", help="Print the result as JSON on stdout.", rich_help_panel="Output")
]
Force = Annotated[bool, typer.Option("--force", help="Replace existing files.", rich_help_panel="Output")]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="No progress, no notes.", rich_help_panel="Output")
]
Verbose = Annotated[
    bool,
    typer.Option("--verbose", "-v", help="More words; tracebacks on failure.", rich_help_panel="Output"),
]


def _begin(quiet: bool, verbose: bool) -> None:
    from vtwcli import distributed

    console.settings.quiet = quiet or not distributed.is_main()
    console.settings.verbose = verbose


CALIBRATE_EXAMPLES = """
Examples:

  vtw calibrate demo

  vtw calibrate llava-hf/llava-1.5-7b-hf --data scienceqa --policy paper

  vtw calibrate ./my-model --data ./mine.jsonl --json | jq .withdrawal_layer
"""


@app.command(epilog=CALIBRATE_EXAMPLES)
def calibrate(
    context: typer.Context,
    model: ModelName = None,
    data: Data = None,
    limit: Annotated[
        int | None, _option(CalibrateSection, "limit", "--limit", rich_help_panel="Data")
    ] = None,
    skip_bad: Annotated[
        bool | None, _option(CalibrateSection, "skip_bad", "--skip-bad", rich_help_panel="Data")
    ] = None,
    eta: Annotated[float | None, _option(CalibrateSection, "eta", "--eta")] = None,
    min_layer: Annotated[int | None, _option(CalibrateSection, "min_layer", "--min-layer")] = None,
    policy: Annotated[str | None, _option(CalibrateSection, "policy", "--policy")] = None,
    positions: Annotated[str | None, _option(CalibrateSection, "positions", "--positions")] = None,
    answers: Annotated[str | None, _option(CalibrateSection, "answers", "--answers")] = None,
    max_new_tokens: Annotated[
        int | None, _option(CalibrateSection, "max_new_tokens", "--max-new-tokens")
    ] = None,
    quantile: Annotated[float | None, _option(CalibrateSection, "quantile", "--quantile")] = None,
    agreement: Annotated[float | None, _option(CalibrateSection, "agreement", "--agreement")] = None,
    budget: Annotated[float | None, _option(CalibrateSection, "budget", "--budget")] = None,
    budget_of: Annotated[str | None, _option(CalibrateSection, "budget_of", "--budget-of")] = None,
    bootstrap: Annotated[int | None, _option(CalibrateSection, "bootstrap", "--bootstrap")] = None,
    seed: Annotated[int | None, _option(CalibrateSection, "seed", "--seed")] = None,
    resume: Annotated[bool | None, _option(CalibrateSection, "resume", "--resume")] = None,
    recipe: RecipeFile = None,
    sets: Sets = None,
    device: Device = None,
    dtype: Dtype = None,
    attn: Attn = None,
    stream: Stream = None,
    trust_remote_code: Trust = None,
    output: Output = None,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE", help="Curve picture, png or svg.", rich_help_panel="Output"),
    ] = None,
    as_json: Json = False,
    force: Force = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Find the withdrawal layer K: the first layer that runs without visual tokens and nobody notices.

    Runs a few samples and compares, for every layer, the next-token
    distribution without visual tokens from that layer on with the full
    model's (KL in nats). Writes the result (JSON), the schedule (YAML) and
    a picture of the curve, by default into vtw-MODEL/. Exit code 3 when no
    layer qualifies.
    """
    _begin(quiet, verbose)
    base = _recipe(context.params)
    options = _section(CalibrateSection, context.params, base.calibrate)
    where, specs = _model(context.params, base), _data(context.params, base)
    outputs = _calibration_outputs(where.name, output, plot, as_json)
    from vtwcli import files

    files.check_free(outputs.values(), force)

    from vtwcli.calibrate import calibrate as run
    from vtwcli.distributed import finish, is_main

    state = outputs["result"].with_suffix(".partial.jsonl") if options.resume and outputs["result"] else None
    result = run(where, specs, options, state=state)
    if is_main():
        _publish_calibration(result, outputs, as_json)
    finish()
    if result["withdrawal_layer"] is None:
        from vtwcli.report import calibration_sentence

        raise GateError(calibration_sentence(result), "more samples, a larger --eta, or --policy budget")


def _calibration_outputs(
    model: str, output: Path | None, plot: Path | None, as_json: bool
) -> dict[str, Path | None]:
    """Where the result, the schedule and the picture go; nowhere under ``--json`` without ``--output``."""
    if output is None and not as_json:
        slug = model.rstrip("/").replace("@", "-").rsplit("/", 1)[-1] or "model"
        output = Path(f"vtw-{slug}") / "calibration.json"
    if plot is not None and plot.suffix not in (".png", ".svg", ".pdf"):
        raise UsageError(f"--plot: {plot} must end in .png, .svg or .pdf")
    return {
        "result": output,
        "schedule": output.with_suffix(".schedule.yaml") if output else None,
        "plot": plot or (output.with_suffix(".png") if output else None),
    }


def _publish_calibration(result: dict[str, Any], outputs: dict[str, Path | None], as_json: bool) -> None:
    from vtwcli import files, report
    from vtwcli.schedule import Schedule

    text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
    if outputs["plot"]:
        report.plot_calibration(result, outputs["plot"])
    if outputs["schedule"] and result["schedule"]:
        files.write_text(outputs["schedule"], Schedule.from_dict(result["schedule"]).to_yaml())
    if outputs["result"]:
        files.write_text(outputs["result"], text)
    if as_json:
        console.result_text(text)
    else:
        console.result(report.calibration_view(result))
    written = [str(path) for path in outputs.values() if path and path.exists()]
    if written:
        console.note("wrote " + ", ".join(written))
