"""``vtw eval``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from vtwcli.commands.options import (
    Attn,
    Consecutive,
    Data,
    Device,
    Dtype,
    ExitLayers,
    ExitThreshold,
    Force,
    Json,
    Layer0,
    LayerThreshold,
    Method,
    ModelName,
    Output,
    Quiet,
    RecipeFile,
    Sets,
    ShallowMidLayer,
    TokensThreshold,
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
    state_beside,
)
from vtwcli.errors import GateError
from vtwcli.recipe.recipe import EvalSection, GatesSection
from vtwcli.recipe.settings import section_of
from vtwcli.results.calibration import CalibratedOn, SearchedSample
from vtwcli.results.evaluation import EVALUATION

EXAMPLES = """
Examples:

  vtw eval demo --layer 6

  vtw eval demo --layers 4,6,8 --limit 100

  vtw eval demo --method visipruner --shallow-mid-layer 0 --trace trace.jsonl

  vtw eval MODEL --schedule calibration.json --max-drop 0.01

  vtw eval DIR --baseline MODEL
"""


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
    method: Method = None,
    shallow_mid_layer: ShallowMidLayer = None,
    layer_threshold: LayerThreshold = None,
    tokens_threshold: TokensThreshold = None,
    exit_threshold: ExitThreshold = None,
    exit_layers: ExitLayers = None,
    consecutive: Consecutive = None,
    layer0: Layer0 = None,
    data: Data = None,
    limit: Annotated[int | None, option(EvalSection, "limit", "--limit", rich_help_panel="Data")] = None,
    skip_bad: Annotated[
        bool | None, option(EvalSection, "skip_bad", "--skip-bad", rich_help_panel="Data")
    ] = None,
    max_new_tokens: Annotated[int | None, option(EvalSection, "max_new_tokens", "--max-new-tokens")] = None,
    batch_size: Annotated[int | None, option(EvalSection, "batch_size", "--batch-size")] = None,
    bootstrap: Annotated[int | None, option(EvalSection, "bootstrap", "--bootstrap")] = None,
    timing: Annotated[bool | None, option(EvalSection, "timing", "--timing/--no-timing")] = None,
    repeats: Annotated[int | None, option(EvalSection, "repeats", "--repeats")] = None,
    timing_tokens: Annotated[int | None, option(EvalSection, "timing_tokens", "--timing-tokens")] = None,
    seed: Annotated[int | None, option(EvalSection, "seed", "--seed")] = None,
    resume: Annotated[bool | None, option(EvalSection, "resume", "--resume")] = None,
    max_drop: Annotated[
        float | None, option(GatesSection, "max_drop", "--max-drop", rich_help_panel="Gates")
    ] = None,
    max_kl: Annotated[
        float | None, option(GatesSection, "max_kl", "--max-kl", rich_help_panel="Gates")
    ] = None,
    min_agreement: Annotated[
        float | None, option(GatesSection, "min_agreement", "--min-agreement", rich_help_panel="Gates")
    ] = None,
    max_flops: Annotated[
        float | None, option(GatesSection, "max_flops", "--max-flops", rich_help_panel="Gates")
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            "--calibration",
            metavar="FILE",
            help="Calibration result whose samples are left out; those of --schedule are anyway.",
            rich_help_panel="Data",
        ),
    ] = None,
    baseline: Annotated[
        str | None, option(EvalSection, "baseline", "--baseline", rich_help_panel="Model")
    ] = None,
    backend: Annotated[
        str | None, option(EvalSection, "backend", "--backend", rich_help_panel="Model")
    ] = None,
    recipe: RecipeFile = None,
    sets: Sets = None,
    device: Device = None,
    dtype: Dtype = None,
    attn: Attn = None,
    trust_remote_code: Trust = None,
    output: Output = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            "--trace",
            metavar="FILE",
            help="JSON lines: per sample and schedule the tokens kept, where, and what it cost.",
            rich_help_panel="Output",
        ),
    ] = None,
    as_json: Json = False,
    force: Force = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Show what pruning costs and saves: full and pruned on the same samples.

    MODEL is a stock model with a schedule, or a directory that vtw export
    made, which brings its schedule along. Compares answers by each task's
    metric, the distributions by KL, and the work by FLOPs, KV cache and
    measured latency. Writes the result (JSON), tables (Markdown), a page with
    the answers that differ (HTML) and a plot. Exit code 3 when a gate fails.
    """
    begin(quiet, verbose)
    base = recipe_of(context.params)
    options = section_of(EvalSection, context.params, base.eval)
    limits = section_of(GatesSection, context.params, base.gates)
    where, specs = model_of(context.params, base), data_of(context.params, base)
    from vtwcli.recipe.schedules import schedules_of

    schedules = schedules_of(context.params, base)
    outputs = output_paths(where.name, output, as_json, EVALUATION, force=force, trace=trace)
    outputs.check(inputs_here(context.params, base, where, specs))

    from vtwcli.judge import gates
    from vtwcli.report import evaluation as report_eval

    file = base.schedule.file
    calibrated = _calibrated(calibration, schedule or ([Path(file)] if file else []))
    state = state_beside(outputs["result"], options.resume)

    from vtwcli.evaluate import evaluate as run
    from vtwcli.machine.distributed import finish, is_main

    lines: list[str] | None = None if trace is None else []
    result, samples = run(
        where,
        schedules,
        specs,
        options,
        calibration=calibrated,
        limits=limits,
        trace=None if lines is None else lines.append,
        state=state,
    )
    if is_main():
        report_eval.write_evaluation(result, samples, outputs, None if lines is None else "".join(lines))
        show(result, report_eval.evaluation_view, outputs, as_json)
    finish()
    failed = [gate for gate in result["gates"] if not gate["passed"]]
    if failed and is_main():
        raise GateError(gates.sentence(failed[0]), f"{len(failed)} of {len(result['gates'])} gates failed")


def _calibrated(calibration: Path | None, schedules: Sequence[Path]) -> CalibratedOn | None:
    """The samples of the calibration result, and of those schedule files that are one."""
    from vtwcli.results.reading import calibration_in, read_calibration

    found = [read_calibration(calibration), *map(calibration_in, schedules)]
    samples: list[SearchedSample] = [sample for one in found if one for sample in one["samples"]]
    return {"samples": samples} if samples else None
