"""``vtw budget``."""

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
from vtwcli.errors import GateError
from vtwcli.recipe.recipe import BudgetSection
from vtwcli.recipe.settings import section_of
from vtwcli.results.comparison import BUDGET

EXAMPLES = """
Examples:

  vtw budget demo

  vtw budget MODEL --max-flops 0.6 --data ./mine.jsonl

  vtw budget demo --methods vtw,attention,random --ratios 0.5,0.2
"""


def budget(
    context: typer.Context,
    model: ModelName = None,
    max_flops: Annotated[float | None, option(BudgetSection, "max_flops", "--max-flops")] = None,
    methods: Annotated[
        str | None, option(BudgetSection, "methods", "--methods", metavar="NAME,NAME,...")
    ] = None,
    ratios: Annotated[str | None, option(BudgetSection, "ratios", "--ratios", metavar="R,R,...")] = None,
    keep_layer: Annotated[int | None, option(BudgetSection, "keep_layer", "--keep-layer")] = None,
    thresholds: Annotated[
        str | None, option(BudgetSection, "thresholds", "--thresholds", metavar="T,T,...")
    ] = None,
    max_new_tokens: Annotated[int | None, option(BudgetSection, "max_new_tokens", "--max-new-tokens")] = None,
    batch_size: Annotated[int | None, option(BudgetSection, "batch_size", "--batch-size")] = None,
    seed: Annotated[int | None, option(BudgetSection, "seed", "--seed")] = None,
    data: Data = None,
    limit: Annotated[int | None, option(BudgetSection, "limit", "--limit", rich_help_panel="Data")] = None,
    skip_bad: Annotated[
        bool | None, option(BudgetSection, "skip_bad", "--skip-bad", rich_help_panel="Data")
    ] = None,
    recipe: RecipeFile = None,
    sets: Sets = None,
    device: Device = None,
    dtype: Dtype = None,
    attn: Attn = None,
    trust_remote_code: Trust = None,
    output: Output = None,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE", help="Picture, png, svg or pdf.", rich_help_panel="Output"),
    ] = None,
    as_json: Json = False,
    force: Force = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Compare methods on your model: what each schedule costs, and how far it is from the full model.

    Runs withdrawal at every layer, VisiPruner, kept subsets and random
    controls on the same samples, and compares their next-token
    distributions along the full model's answers. Writes the table (JSON),
    a picture with the Pareto front, and with --max-flops the schedule
    closest to the full model within the budget (YAML); exit code 3 when
    there is none.
    """
    begin(quiet, verbose)
    base = recipe_of(context.params)
    options = section_of(BudgetSection, context.params, base.budget)
    where, specs = model_of(context.params, base), data_of(context.params, base)
    outputs = output_paths(where.name, output, as_json, BUDGET, plot, force)
    if options.max_flops is None:
        outputs["schedule"] = None
    outputs.check(inputs_here(context.params, base, where, specs))

    from vtwcli.budget import budget as run
    from vtwcli.machine.distributed import finish, is_main
    from vtwcli.report import budget as report_budget

    result = run(where, specs, options, base.schedule)
    if is_main():
        report_budget.write_budget(result, outputs)
        show(result, report_budget.budget_view, outputs, as_json)
    finish()
    if (missed := report_budget.shortfall(result)) and is_main():
        raise GateError(missed, "a larger --max-flops, or smaller --ratios")
