"""``vtw export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vtwcli.commands.options import (
    Consecutive,
    ExitLayers,
    ExitThreshold,
    Force,
    Json,
    Layer0,
    LayerThreshold,
    Method,
    ModelName,
    Quiet,
    RecipeFile,
    Sets,
    ShallowMidLayer,
    TokensThreshold,
    Trust,
    Verbose,
    begin,
    inputs_here,
    model_of,
    option,
    recipe_of,
)
from vtwcli.errors import UsageError
from vtwcli.io import console
from vtwcli.io.files import document
from vtwcli.recipe.recipe import ExportSection
from vtwcli.recipe.settings import section_of

EXAMPLES = """
Examples:

  vtw export demo --layer 9 --output demo-pruned

  vtw export MODEL --calibration vtw-MODEL/calibration.json --output pruned

  vtw export MODEL --layer 16 --format onnx --dtype float16 --output graphs
"""


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
    method: Method = None,
    shallow_mid_layer: ShallowMidLayer = None,
    layer_threshold: LayerThreshold = None,
    tokens_threshold: TokensThreshold = None,
    exit_threshold: ExitThreshold = None,
    exit_layers: ExitLayers = None,
    consecutive: Consecutive = None,
    layer0: Layer0 = None,
    kind: Annotated[str | None, option(ExportSection, "format", "--format")] = None,
    dtype: Annotated[str | None, option(ExportSection, "dtype", "--dtype")] = None,
    evaluation: Annotated[
        Path | None,
        typer.Option("--evaluation", metavar="FILE", help="Evaluation result for the model card (hf)."),
    ] = None,
    opset: Annotated[int | None, option(ExportSection, "opset", "--opset", rich_help_panel="ONNX")] = None,
    merged: Annotated[
        bool | None, option(ExportSection, "merged", "--merged", rich_help_panel="ONNX")
    ] = None,
    quantize: Annotated[
        str | None, option(ExportSection, "quantize", "--quantize", rich_help_panel="ONNX")
    ] = None,
    recipe: RecipeFile = None,
    sets: Sets = None,
    trust_remote_code: Trust = None,
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
    begin(quiet, verbose)
    base = recipe_of(context.params)
    options = section_of(ExportSection, {**context.params, "format": kind}, base.export)
    where = model_of({**context.params, "dtype": None}, base)
    if output is None:
        raise UsageError("no output directory given", "--output DIR")
    from vtwcli.export.directory.publish import check_target
    from vtwcli.recipe.schedules import schedules_of
    from vtwcli.results.reading import read_calibration, read_evaluation

    paths = [path for path in (schedule, calibration) if path is not None]
    named = schedules_of({**context.params, "schedule": paths}, base)
    if len(named) != 1:
        raise UsageError("give exactly one of --schedule, --calibration, --layer and --method")
    [(_, chosen)] = named
    if push_to_hub and options.format != "hf":
        raise UsageError(
            "--push-to-hub goes with --format hf only", "upload ONNX graphs with: hf upload REPO DIR"
        )
    check_target(output, force, inputs_here(context.params, base, where, ()))
    from vtwcli.export.formats import export as run

    manifest = run(
        where,
        chosen,
        output,
        options,
        force=force,
        calibration=read_calibration(calibration),
        evaluation=read_evaluation(evaluation),
        recipe=recipe.read_text(encoding="utf-8") if recipe else None,
    )
    if push_to_hub:
        from vtwcli.export.directory.push import push

        console.note(f"uploaded {push(output, push_to_hub, private=not public)}")
    if as_json:
        console.result_text(document(manifest))
    else:
        console.result_text(f"wrote {output}")
