"""The search as a step of a run."""

from __future__ import annotations

from typing import Any, ClassVar

from vtwcli.machine.distributed import is_main
from vtwcli.pipeline.run import Outcome, Run, Step
from vtwcli.recipe.recipe import Recipe
from vtwcli.recipe.search import GOALS
from vtwcli.results.search import SEARCH


class Search(Step):
    """Looks for the best schedule within a goal; later steps take it, unless the recipe names one."""

    name = "search"
    kind = SEARCH.format
    writes: ClassVar = SEARCH.named()
    partial = "search.partial.jsonl"

    def lacks(self, recipe: Recipe) -> tuple[str, str] | None:
        if recipe.search.goals:
            return None
        return "search: there is no goal", f"add one of {', '.join(GOALS)}"

    def depends(self, recipe: Recipe, placed: Recipe) -> list[Any]:
        return [placed.schedule.model_dump(mode="json", exclude={"file", "layer", "method"})]

    def run(self, run: Run) -> Outcome:
        from vtwcli.report.search import search_line, write_search
        from vtwcli.search import search

        recipe, state = run.recipe, run.folder / self.partial
        result = search(recipe.model, recipe.data, recipe.search, recipe.schedule, state=state)
        if is_main():
            write_search(result, self.outputs(run.folder, run.owned))
        run.results[self.name] = result
        found = {key: result[key] for key in ("best", "promised", "proven", "pareto")}
        return Outcome(search_line(result), found)

    def judge(self, run: Run) -> str | None:
        from vtwcli.report.search import shortfall

        result = run.result(self.name)
        missed = None if result is None else shortfall(result)
        return missed[0].rstrip(".") if missed else None

    def page(self, run: Run) -> str | None:
        from vtwcli.report.search import markdown

        result = run.result(self.name)
        return None if result is None else markdown(result)
