"""``vtw run``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vtwcli.commands.flags import PRINTED, SET, TRUST, argument, flag, flags
from vtwcli.commands.options import begin, recipe_of
from vtwcli.errors import GateError
from vtwcli.io import console
from vtwcli.io.files import document

EXAMPLES = """
Examples:

  vtw recipe init demo > demo.yaml && vtw run demo.yaml

  vtw run demo.yaml --dry-run

  vtw run demo.yaml --summary "$GITHUB_STEP_SUMMARY" --set eval.limit=100
"""


@flags(
    argument("recipe", Path, "RECIPE", "Recipe file, YAML or JSON."),
    flag("dry_run", bool, "Show the steps and stop."),
    flag("only", list[str], "Run this step alone; may be given several times.", metavar="STEP"),
    flag("start", str, "Run this step and those behind it again.", spelled="--from", metavar="STEP"),
    SET,
    TRUST,
    flag(
        "output",
        Path,
        "Directory of the results; by default the recipe's, else vtw-run-NAME.",
        "-o",
        metavar="DIR",
        panel="Output",
    ),
    flag("summary", Path, "Append the summary (Markdown) to this file.", metavar="FILE", panel="Output"),
    PRINTED,
)
def command(**given: Any) -> None:
    """Run the steps that a recipe has: calibrate, analyze, budget, search, eval,
    export.

    Steps whose inputs (section, model, data, tool, earlier steps) have not
    changed are kept, so an interrupted run continues. The export is made
    aside, verified, and published last. Exit code 3 when no layer qualifies,
    no schedule fits the budget or a gate fails; then nothing is exported.
    """
    begin(given)
    from vtwcli.machine.distributed import finish, is_main
    from vtwcli.pipeline.plan import execute, make_plan
    from vtwcli.pipeline.run import alone
    from vtwcli.pipeline.summary import check_summary, plan_view, summary_view, write_summary

    file: Path = given["recipe"]
    summary: Path | None = given["summary"]
    recipe = recipe_of(given)
    folder = given["output"] or Path(recipe.output or f"vtw-run-{file.stem}")
    text = file.read_text(encoding="utf-8")
    only, start, force = given["only"] or (), given["start"], given["force"]
    work = make_plan(recipe, folder, text=text, only=only, start=start, force=force, file=file)
    if summary is not None:
        check_summary(summary, work)
    if given["dry_run"]:
        console.result_text(document(work.document()) if given["json"] else plan_view(work))
        return
    console.note(plan_view(work))
    with alone(work):
        console.settings.kept = lambda: (
            f"finished steps are kept in {folder}: the same command goes on from them"
        )
        try:
            found = execute(work)
        except BaseException:
            if is_main():
                with console.not_worth_failing("the summary cannot be written"):
                    write_summary(work, summary)
            raise
        if is_main():
            write_summary(work, summary)
    if is_main():
        console.result_text(document(found) if given["json"] else summary_view(work))
    finish()
    if work.failure and is_main():
        earlier = f"; {folder / 'model'} is of an earlier run" if (folder / "model").exists() else ""
        raise GateError(work.failure, "later steps did not run" + earlier)
