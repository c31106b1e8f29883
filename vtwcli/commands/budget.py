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
from vtwcli.commands.options import (
    begin,
    data_of,
    inputs_here,
    model_of,
    output_paths,
    recipe_of,
    show,
    state_beside,
)
from vtwcli.errors import GateError, UsageError
from vtwcli.recipe.recipe import BudgetSection, Recipe
from vtwcli.recipe.search import SearchSection
from vtwcli.recipe.settings import section_of
from vtwcli.results.comparison import BUDGET
from vtwcli.results.search import SEARCH

EXAMPLES = """
Examples:

  vtw budget demo

  vtw budget MODEL --max-flops 0.6 --data ./mine.jsonl

  vtw budget demo --methods vtw,attention,random --ratios 0.5,0.2

  vtw budget MODEL --search --max-flops 0.4

  vtw budget MODEL --search --max-kl 0.01 --risk 0.05 --minutes 30 --resume
"""
_SHARED = set(BudgetSection.model_fields) & set(SearchSection.model_fields)


@flags(
    MODEL,
    DATA,
    fields(BudgetSection),
    flag(
        "search",
        bool,
        "Search instead: the best schedule of methods and combinations within a goal, with a promise; "
        "--limit is then 300 by default.",
        panel="Search",
    ),
    fields(SearchSection, without=_SHARED),
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

    With --search it looks for the best schedule within a goal, among all
    methods and what no method publishes: parts kept at one or two layers,
    frozen layers, a withdrawal. Given --max-flops or --max-kv, the closest
    is best, else the cheapest. The samples have three parts: to search, to
    choose, and to test what is promised of the choice.
    """
    begin(given)
    base = recipe_of(given)
    _check_kind(given)
    if given["search"]:
        _search(given, base)
        return
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


def _check_kind(given: dict[str, Any]) -> None:
    """Refuse options of the comparison in a search, and the other way round."""
    mine, other = (SearchSection, BudgetSection) if given["search"] else (BudgetSection, SearchSection)
    for name in other.model_fields:
        if given.get(name) not in (None, False) and name not in mine.model_fields:
            does = "does not go with" if given["search"] else "goes with"
            raise UsageError(f"--{name.replace('_', '-')} {does} --search")


def _search(given: dict[str, Any], base: Recipe) -> None:
    options = section_of(SearchSection, given, base.search)
    where, specs = model_of(given, base), data_of(given, base)
    outputs = output_paths(given, where.name, SEARCH)
    outputs.check(inputs_here(given, base, where, specs))

    from vtwcli.machine.distributed import finish, is_main
    from vtwcli.report.search import search_view, shortfall, write_search
    from vtwcli.search import search

    state = state_beside(outputs["result"], options.resume)
    result = search(where, specs, options, base.schedule, state=state)
    if is_main():
        write_search(result, outputs)
        show(result, search_view, outputs, given)
    finish()
    if (missed := shortfall(result)) and is_main():
        raise GateError(*missed)
