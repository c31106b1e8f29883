"""``vtw calibrate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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
    state_beside,
)
from vtwcli.errors import GateError
from vtwcli.recipe.recipe import CalibrateSection
from vtwcli.recipe.settings import section_of
from vtwcli.results.calibration import CALIBRATION

EXAMPLES = """
Examples:

  vtw calibrate demo

  vtw calibrate llava-hf/llava-1.5-7b-hf --data scienceqa --policy paper

  vtw calibrate demo --method visipruner --eta 0.01

  vtw calibrate ./my-model --data ./mine.jsonl --json | jq .withdrawal_layer
"""


def calibrate(
    context: typer.Context,
    model: ModelName = None,
    data: Data = None,
    limit: Annotated[int | None, option(CalibrateSection, "limit", "--limit", rich_help_panel="Data")] = None,
    skip_bad: Annotated[
        bool | None, option(CalibrateSection, "skip_bad", "--skip-bad", rich_help_panel="Data")
    ] = None,
    method: Annotated[str | None, option(CalibrateSection, "method", "--method")] = None,
    eta: Annotated[float | None, option(CalibrateSection, "eta", "--eta")] = None,
    min_layer: Annotated[int | None, option(CalibrateSection, "min_layer", "--min-layer")] = None,
    policy: Annotated[str | None, option(CalibrateSection, "policy", "--policy")] = None,
    positions: Annotated[str | None, option(CalibrateSection, "positions", "--positions")] = None,
    answers: Annotated[str | None, option(CalibrateSection, "answers", "--answers")] = None,
    max_new_tokens: Annotated[
        int | None, option(CalibrateSection, "max_new_tokens", "--max-new-tokens")
    ] = None,
    quantile: Annotated[float | None, option(CalibrateSection, "quantile", "--quantile")] = None,
    agreement: Annotated[float | None, option(CalibrateSection, "agreement", "--agreement")] = None,
    budget: Annotated[float | None, option(CalibrateSection, "budget", "--budget")] = None,
    budget_of: Annotated[str | None, option(CalibrateSection, "budget_of", "--budget-of")] = None,
    bootstrap: Annotated[int | None, option(CalibrateSection, "bootstrap", "--bootstrap")] = None,
    seed: Annotated[int | None, option(CalibrateSection, "seed", "--seed")] = None,
    resume: Annotated[bool | None, option(CalibrateSection, "resume", "--resume")] = None,
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
    layer qualifies. With --method visipruner it searches that method's
    shallow boundary and thresholds instead, by running the candidates.
    """
    begin(quiet, verbose)
    base = recipe_of(context.params)
    options = section_of(CalibrateSection, context.params, base.calibrate)
    where, specs = model_of(context.params, base), data_of(context.params, base)
    outputs = output_paths(where.name, output, as_json, CALIBRATION, plot, force)
    outputs.check(inputs_here(context.params, base, where, specs))

    from vtwcli.calibrate import calibrate as run
    from vtwcli.machine.distributed import finish, is_main
    from vtwcli.report import calibration as report_calibrate

    state = state_beside(outputs["result"], options.resume)
    result = run(where, specs, options, state=state, rule=base.schedule)
    if is_main():
        report_calibrate.write_calibration(result, outputs)
        show(result, report_calibrate.calibration_view, outputs, as_json)
    finish()
    if result["schedule"] is None and is_main():
        raise GateError(
            report_calibrate.calibration_sentence(result), "more samples, a larger --eta, or --policy budget"
        )
