"""``vtw budget``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vtwcli.commands.flags import (
    DATA,
    MODEL,
    OUTPUT,
    PRINTED,
    SETTINGS,
    TRACK,
    WHERE_STREAMED,
    fields,
    flag,
    flags,
)
from vtwcli.commands.options import begin, data_of, inputs_here, model_of, output_paths, recipe_of, show
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


@flags(
    MODEL,
    DATA,
    fields(BudgetSection),
    SETTINGS,
    WHERE_STREAMED,
    OUTPUT,
    flag("plot", Path, "Picture, png, svg or pdf.", metavar="FILE", panel="Output"),
    TRACK,
    PRINTED,
)
def command(**given: Any) -> None:
    """Compare methods on your model: what each schedule costs, and how far it is from the full model.

    Runs withdrawal at every layer, VisiPruner, kept subsets and random
    controls on the same samples, and compares their next-token
    distributions along the full model's answers. Writes the table (JSON),
    a picture with the Pareto front, and with --max-flops the schedule
    closest to the full model within the budget (YAML); exit code 3 when
    there is none.
    """
    begin(given)
    base = recipe_of(given)
    options = section_of(BudgetSection, given, base.budget)
    where, specs = model_of(given, base), data_of(given, base)
    outputs = output_paths(given, where.name, BUDGET)
    if options.max_flops is None:
        outputs["schedule"] = None
    outputs.check(inputs_here(given, base, where, specs))

    from vtwcli.budget import budget
    from vtwcli.machine.distributed import finish, is_main
    from vtwcli.report.budget import budget_view, shortfall, write_budget

    result = budget(where, specs, options, base.schedule)
    if is_main():
        write_budget(result, outputs)
        show(result, budget_view, outputs, given)
    finish()
    if (missed := shortfall(result)) and is_main():
        raise GateError(missed, "a larger --max-flops, or smaller --ratios")
