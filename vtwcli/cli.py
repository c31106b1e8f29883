"""The ``vtw`` command: each subcommand parses, calls one library function and prints.

Nothing heavy is imported at the top: ``vtw --help`` must answer at once. Options default to None here; their one
default lives in ``vtwcli.recipe`` and the help pages read it from there.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from vtwcli import __version__, console
from vtwcli.errors import GateError, UsageError, VtwError
from vtwcli.recipe import (
    CalibrateSection,
    DataSpec,
    EvalSection,
    ExportSection,
    ModelSection,
    Recipe,
    Section,
)

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
    if plot is not None and plot.suffix not in (".png", ".svg", ".pdf"):
        raise UsageError(f"--plot: {plot} must end in .png, .svg or .pdf")
    beside = {"schedule": ".schedule.yaml", "plot": ".png"}
    outputs = _outputs(where.name, output, as_json, "calibration", beside)
    outputs["plot"] = plot or outputs["plot"]
    from vtwcli import files

    files.check_free(outputs.values(), force)

    from vtwcli.calibrate import calibrate as run
    from vtwcli.distributed import finish, is_main

    state = outputs["result"].with_suffix(".partial.jsonl") if options.resume and outputs["result"] else None
    result = run(where, specs, options, state=state)
    if is_main():
        _publish_calibration(result, outputs, as_json)
    finish()
    if result["withdrawal_layer"] is None and is_main():
        from vtwcli.report import calibration_sentence

        raise GateError(calibration_sentence(result), "more samples, a larger --eta, or --policy budget")


EXPORT_EXAMPLES = """
Examples:

  vtw export demo --layer 9 --output demo-pruned

  vtw export MODEL --calibration vtw-MODEL/calibration.json --output pruned

  vtw export MODEL --layer 16 --format onnx --dtype float16 --output graphs
"""


@app.command(epilog=EXPORT_EXAMPLES)
def export(
    context: typer.Context,
    model: ModelName = None,
    schedule: Annotated[
        Path | None, typer.Option("--schedule", metavar="FILE", help="Schedule to bake in, YAML or JSON.")
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option("--calibration", metavar="FILE", help="Calibration result whose schedule is baked in."),
    ] = None,
    layer: Annotated[int | None, typer.Option("--layer", min=0, help="Withdraw at this layer.")] = None,
    kind: Annotated[str | None, _option(ExportSection, "format", "--format")] = None,
    dtype: Annotated[str | None, _option(ExportSection, "dtype", "--dtype")] = None,
    evaluation: Annotated[
        Path | None,
        typer.Option("--evaluation", metavar="FILE", help="Evaluation result for the model card (hf)."),
    ] = None,
    opset: Annotated[int | None, _option(ExportSection, "opset", "--opset", rich_help_panel="ONNX")] = None,
    merged: Annotated[
        bool | None, _option(ExportSection, "merged", "--merged", rich_help_panel="ONNX")
    ] = None,
    quantize: Annotated[
        str | None, _option(ExportSection, "quantize", "--quantize", rich_help_panel="ONNX")
    ] = None,
    recipe: RecipeFile = None,
    sets: Sets = None,
    push_to_hub: Annotated[
        str | None,
        typer.Option("--push-to-hub", metavar="REPO", help="Upload the directory (hf), private by default."),
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Make the uploaded repository public.")] = False,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="Directory to make.", rich_help_panel="Output"),
    ] = None,
    as_json: Json = False,
    force: Force = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write a model with its schedule baked in: a Hugging Face directory, or ONNX graphs.

    The directory appears only when it is complete and checked. The Hugging
    Face form loads pruned with trust_remote_code=True where this tool is not
    installed, and as the plain model without it.
    """
    _begin(quiet, verbose)
    base = _recipe(context.params)
    options = _section(ExportSection, {**context.params, "format": kind}, base.export)
    where = _model({**context.params, "dtype": None}, base)
    if output is None:
        raise UsageError("no output directory given", "--output DIR")
    if sum(x is not None for x in (schedule, calibration, layer)) != 1:
        raise UsageError("give exactly one of --schedule, --calibration and --layer")
    from vtwcli.schedule import Schedule

    path = schedule or calibration
    chosen = Schedule.from_file(path) if path else Schedule.withdraw_at(int(layer or 0))
    if options.format == "onnx":
        manifest = _export_onnx(where, chosen, output, options, force)
    else:
        from vtwcli.export.hf import export_hf

        manifest = export_hf(
            where.name,
            chosen,
            output,
            dtype=_HF_DTYPES.get(options.dtype, options.dtype),
            force=force,
            calibration=_json_file(calibration),
            evaluation=_json_file(evaluation),
            recipe=recipe.read_text(encoding="utf-8") if recipe else None,
        )
        if push_to_hub:
            from vtwcli.export.push import push

            console.note(f"uploaded {push(output, push_to_hub, private=not public)}")
    if as_json:
        console.result_text(_document(manifest))
    else:
        console.result_text(f"wrote {output}")


_HF_DTYPES = {"auto": None, "fp32": "float32", "fp16": "float16"}
_ONNX_DTYPES = {"auto": "fp32", "float32": "fp32", "float16": "fp16"}


def _export_onnx(
    where: ModelSection, schedule: Any, output: Path, options: ExportSection, force: bool
) -> dict[str, Any]:
    if options.dtype == "bfloat16":
        raise UsageError("--dtype: ONNX graphs are float32 or float16, not bfloat16")
    from vtwcli.export.onnx import export_onnx
    from vtwcli.models.checkpoint import resolve

    return export_onnx(
        resolve(where.name, trust_remote_code=where.trust_remote_code),
        schedule,
        output,
        dtype=_ONNX_DTYPES.get(options.dtype, options.dtype),
        opset=options.opset,
        merged=options.merged,
        quantize=options.quantize,
        force=force,
    )


def _json_file(path: Path | None) -> dict[str, Any] | None:
    """A result document that another command wrote."""
    if path is None:
        return None
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot read the result file: {error}") from None
    if not isinstance(document, dict):
        raise UsageError(f"{path}: not a result file")
    return document


VERIFY_EXAMPLES = """
Examples:

  vtw export demo --layer 9 --output demo-pruned && vtw verify demo-pruned

  vtw verify pruned --base llava-hf/llava-1.5-7b-hf --json
"""


@app.command(epilog=VERIFY_EXAMPLES)
def verify(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Directory that vtw export made.")],
    base: Annotated[
        str | None,
        typer.Option(
            "--base", metavar="MODEL", help="Base model to compare with; by default the one it names."
        ),
    ] = None,
    image: Annotated[
        Path | None, typer.Option("--image", metavar="FILE", help="Image to ask about; by default a drawing.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Tokens to generate.")] = 16,
    device: Device = None,
    dtype: Dtype = None,
    trust_remote_code: Trust = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Check an exported directory: files, loading, a smoke generation, parity with the base.

    Exit code 3 when a check fails, 4 when it is not an export.
    """
    _begin(quiet, verbose)
    from vtwcli.export.verify import verify as run

    report = run(
        directory,
        base=base,
        image=image,
        device=device or "auto",
        dtype=dtype or "auto",
        max_new_tokens=max_new_tokens,
        trust_remote_code=bool(trust_remote_code),
    )
    if as_json:
        console.result_text(_document(report))
    else:
        console.result_text(f"{directory}: verified")


FAMILIES_EXAMPLES = """
Examples:

  vtw families

  vtw families --json | jq -r '.[] | select(.onnx == "yes") | .example'

Try the tool on the model that comes with it:  vtw calibrate demo
"""


@app.command(epilog=FAMILIES_EXAMPLES)
def families(as_json: Json = False) -> None:
    """List the model families, what works with each, and what to know."""
    from vtwcli.models.families import table

    rows = table()
    if as_json:
        console.result_text(json.dumps(rows, indent=1, ensure_ascii=False))
        return
    from rich.table import Table

    view = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("family", "example", "withdraw", "sweep", "analyze", "onnx"):
        view.add_column(name, overflow="fold")
    for row in rows:
        view.add_row(*(row[str(column.header)] for column in view.columns))
    console.result(view)
    for note in dict.fromkeys(row["notes"] for row in rows if row["notes"]):
        console.result(
            "\n" + ", ".join(row["family"] for row in rows if row["notes"] == note) + f":\n  {note}"
        )


def _outputs(
    model: str, output: Path | None, as_json: bool, name: str, beside: dict[str, str]
) -> dict[str, Path | None]:
    """Where the result and the files beside it go; nowhere under ``--json`` without ``--output``."""
    if output is None and not as_json:
        slug = model.rstrip("/").replace("@", "-").rsplit("/", 1)[-1] or "model"
        output = Path(f"vtw-{slug}") / f"{name}.json"
    return {
        "result": output,
        **{key: output.with_suffix(suffix) if output else None for key, suffix in beside.items()},
    }


def _written(outputs: dict[str, Path | None]) -> None:
    paths = [str(path) for path in outputs.values() if path and path.exists()]
    if paths:
        console.note("wrote " + ", ".join(paths))


def _document(result: dict[str, Any]) -> str:
    return json.dumps(result, indent=1, ensure_ascii=False) + "\n"


def _publish_calibration(result: dict[str, Any], outputs: dict[str, Path | None], as_json: bool) -> None:
    from vtwcli import files, report
    from vtwcli.schedule import Schedule

    text = _document(result)
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
    _written(outputs)


EVAL_EXAMPLES = """
Examples:

  vtw eval demo --layer 6

  vtw eval demo --layers 4,6,8 --limit 100

  vtw eval MODEL --schedule calibration.schedule.yaml --max-drop 0.01
"""


@app.command("eval", epilog=EVAL_EXAMPLES)
def evaluate(
    context: typer.Context,
    model: ModelName = None,
    schedule: Annotated[
        list[Path] | None,
        typer.Option(
            "--schedule", metavar="FILE", help="Schedule or calibration result; may be given several times."
        ),
    ] = None,
    layer: Annotated[int | None, typer.Option("--layer", help="Withdraw at this layer.")] = None,
    layers: Annotated[
        str | None, typer.Option("--layers", metavar="K,K,...", help="Compare withdrawal at several layers.")
    ] = None,
    data: Data = None,
    limit: Annotated[int | None, _option(EvalSection, "limit", "--limit", rich_help_panel="Data")] = None,
    skip_bad: Annotated[
        bool | None, _option(EvalSection, "skip_bad", "--skip-bad", rich_help_panel="Data")
    ] = None,
    max_drop: Annotated[float | None, _option(EvalSection, "max_drop", "--max-drop")] = None,
    max_kl: Annotated[float | None, _option(EvalSection, "max_kl", "--max-kl")] = None,
    max_new_tokens: Annotated[int | None, _option(EvalSection, "max_new_tokens", "--max-new-tokens")] = None,
    batch_size: Annotated[int | None, _option(EvalSection, "batch_size", "--batch-size")] = None,
    bootstrap: Annotated[int | None, _option(EvalSection, "bootstrap", "--bootstrap")] = None,
    timing: Annotated[bool | None, _option(EvalSection, "timing", "--timing/--no-timing")] = None,
    repeats: Annotated[int | None, _option(EvalSection, "repeats", "--repeats")] = None,
    timing_tokens: Annotated[int | None, _option(EvalSection, "timing_tokens", "--timing-tokens")] = None,
    seed: Annotated[int | None, _option(EvalSection, "seed", "--seed")] = None,
    calibration: Annotated[
        Path | None,
        typer.Option("--calibration", metavar="FILE", help="Warn when its samples are judged on again."),
    ] = None,
    recipe: RecipeFile = None,
    sets: Sets = None,
    device: Device = None,
    dtype: Dtype = None,
    attn: Attn = None,
    trust_remote_code: Trust = None,
    output: Output = None,
    as_json: Json = False,
    force: Force = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Show what pruning costs and saves: full and pruned on the same samples.

    Compares answers by each task's metric, the distributions by KL, and the
    work by FLOPs, KV cache and measured latency. Writes the result (JSON), a
    table (Markdown), a page with the answers that differ (HTML) and a plot.
    Exit code 3 when a gate (--max-drop, --max-kl) fails.
    """
    _begin(quiet, verbose)
    base = _recipe(context.params)
    options = _section(EvalSection, context.params, base.eval)
    where, specs = _model(context.params, base), _data(context.params, base)
    schedules = _schedules(schedule or (), layer, layers)
    beside = {"markdown": ".md", "page": ".html", "plot": ".png"}
    outputs = _outputs(where.name, output, as_json, "evaluation", beside)
    from vtwcli import files

    files.check_free(outputs.values(), force)
    calibrated = _json_file(calibration)

    from vtwcli.distributed import finish, is_main
    from vtwcli.evaluate import evaluate as run

    result, samples = run(where, schedules, specs, options, calibration=calibrated)
    if is_main():
        _publish_evaluation(result, samples, outputs, as_json)
    finish()
    failed = [gate for gate in result["gates"] if not gate["passed"]]
    if failed and is_main():
        from vtwcli.report_eval import gate_sentence

        raise GateError(gate_sentence(failed[0]), f"{len(failed)} of {len(result['gates'])} gates failed")


def _schedules(paths: Sequence[Path], layer: int | None, layers: str | None) -> list[tuple[str, Any]]:
    """Names and schedules of ``--schedule``, ``--layer`` and ``--layers``."""
    from vtwcli.schedule import Schedule

    wanted = [] if layer is None else [layer]
    for part in (layers or "").split(",") if layers else ():
        if not part.strip().isdigit():
            raise UsageError(f"--layers: {part!r} is not a layer number", "for example --layers 8,12,16")
        wanted.append(int(part))
    if any(k < 0 for k in wanted):
        raise UsageError(f"--layer: {min(wanted)} is not a layer number")
    named = [
        (path.name.removesuffix(".yaml").removesuffix(".schedule"), Schedule.from_file(path))
        for path in paths
    ]
    return named + [(f"K={k}", Schedule.withdraw_at(k)) for k in wanted]


def _publish_evaluation(
    result: dict[str, Any], samples: Sequence[Any], outputs: dict[str, Path | None], as_json: bool
) -> None:
    from vtwcli import files, report_eval

    text = _document(result)
    if outputs["plot"]:
        report_eval.plot_quality(result, outputs["plot"])
    if outputs["page"]:
        files.write_text(outputs["page"], report_eval.html_report(result, samples))
    if outputs["markdown"]:
        files.write_text(outputs["markdown"], report_eval.markdown(result))
    if outputs["result"]:
        files.write_text(outputs["result"], text)
    if as_json:
        console.result_text(text)
    else:
        console.result(report_eval.evaluation_view(result))
    _written(outputs)
