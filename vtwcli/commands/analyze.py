"""``vtw analyze``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vtwcli.commands.options import (
    Attn,
    Data,
    Device,
    Dtype,
    Force,
    Json,
    ModelName,
    Output,
    Quiet,
    RecipeFile,
    Sets,
    Stream,
    Trust,
    Verbose,
    begin,
    data_of,
    inputs_here,
    model_of,
    option,
    output_paths,
    recipe_of,
    show,
)
from vtwcli.io.files import present
from vtwcli.recipe.recipe import AnalyzeSection
from vtwcli.recipe.settings import section_of
from vtwcli.results.analysis import ANALYSIS

if TYPE_CHECKING:
    from vtwcli.analyze import Analysis
    from vtwcli.io.outputs import Outputs

EXAMPLES = """
Examples:

  vtw analyze demo

  vtw analyze llava-hf/llava-1.5-7b-hf --data gqa --data scienceqa --stream

  vtw analyze ./my-model --data ./mine.jsonl --json | jq .stages.sentences
"""


def analyze(
    context: typer.Context,
    model: ModelName = None,
    data: Data = None,
    limit: Annotated[int | None, option(AnalyzeSection, "limit", "--limit", rich_help_panel="Data")] = None,
    skip_bad: Annotated[
        bool | None, option(AnalyzeSection, "skip_bad", "--skip-bad", rich_help_panel="Data")
    ] = None,
    eta: Annotated[float | None, option(AnalyzeSection, "eta", "--eta")] = None,
    min_layer: Annotated[int | None, option(AnalyzeSection, "min_layer", "--min-layer")] = None,
    window: Annotated[int | None, option(AnalyzeSection, "window", "--window")] = None,
    freeze: Annotated[bool | None, option(AnalyzeSection, "freeze", "--freeze/--no-freeze")] = None,
    positions: Annotated[str | None, option(AnalyzeSection, "positions", "--positions")] = None,
    answers: Annotated[str | None, option(AnalyzeSection, "answers", "--answers")] = None,
    max_new_tokens: Annotated[
        int | None, option(AnalyzeSection, "max_new_tokens", "--max-new-tokens")
    ] = None,
    lens: Annotated[int | None, option(AnalyzeSection, "lens", "--lens")] = None,
    maps: Annotated[int | None, option(AnalyzeSection, "maps", "--maps")] = None,
    map_layers: Annotated[
        str | None, option(AnalyzeSection, "map_layers", "--map-layers", metavar="LAYER,...")
    ] = None,
    tokens_threshold: Annotated[
        float | None, option(AnalyzeSection, "tokens_threshold", "--tokens-threshold")
    ] = None,
    seed: Annotated[int | None, option(AnalyzeSection, "seed", "--seed")] = None,
    recipe: RecipeFile = None,
    sets: Sets = None,
    device: Device = None,
    dtype: Dtype = None,
    attn: Attn = None,
    stream: Stream = None,
    trust_remote_code: Trust = None,
    output: Output = None,
    svg: Annotated[
        bool, typer.Option("--svg", help="Plots as SVG, not PNG.", rich_help_panel="Output")
    ] = False,
    as_json: Json = False,
    force: Force = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Show which layers fuse vision and text, which carry vision along, which no longer need it.

    One pass over the layers of a few samples measures, for every layer, what
    the last token reads from the image and what it costs (KL in nats) when
    text does not read it. Writes the profile (JSON), a page with plots and
    heat maps (HTML), the plots, and a static and a dynamic schedule (YAML),
    by default into vtw-MODEL/; --output may also name a directory.
    """
    begin(quiet, verbose)
    base = recipe_of(context.params)
    options = section_of(AnalyzeSection, context.params, base.analyze)
    where, specs = model_of(context.params, base), data_of(context.params, base)
    outputs = outputs_of(where.name, output, as_json, svg, force)
    outputs.check(inputs_here(context.params, base, where, specs))

    from vtwcli.analyze import analyze as run
    from vtwcli.machine.distributed import finish, is_main

    analysis = run(where, specs, options)
    if is_main():
        _publish(analysis, outputs, as_json)
    finish()


def outputs_of(
    model: str, output: Path | None, as_json: bool, svg: bool = False, force: bool = False
) -> Outputs:
    """Where the result and what goes beside it are written."""
    if output is not None and (not output.suffix or (present(output) and output.is_dir())):
        output = output / "analysis.json"
    suffixes = {
        key: suffix.replace(".png", ".svg") if svg else suffix for key, suffix in ANALYSIS.beside.items()
    }
    return output_paths(model, output, as_json, replace(ANALYSIS, beside=suffixes), force=force)


def _publish(analysis: Analysis, outputs: Outputs, as_json: bool) -> None:
    from vtwcli.report import analysis as report_analyze
    from vtwcli.report import analysis_page as report_analyze_page

    report_analyze_page.write_analysis(analysis, outputs)
    show(analysis.result, report_analyze.analysis_view, outputs, as_json)
