"""``vtw run``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vtwcli.commands.options import Force, Json, Quiet, Sets, Trust, Verbose, begin, recipe_of
from vtwcli.errors import GateError
from vtwcli.io import console
from vtwcli.io.files import document

EXAMPLES = """
Examples:

  vtw recipe init demo > demo.yaml && vtw run demo.yaml

  vtw run demo.yaml --dry-run

  vtw run demo.yaml --summary "$GITHUB_STEP_SUMMARY" --set eval.limit=100
"""


def run(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe file, YAML or JSON.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the steps and stop.")] = False,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="STEP", help="Run this step alone; may be given several times."),
    ] = None,
    start: Annotated[
        str | None,
        typer.Option("--from", metavar="STEP", help="Run this step and those behind it again."),
    ] = None,
    sets: Sets = None,
    trust_remote_code: Trust = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="Directory of the results; by default the recipe's, else vtw-run-NAME.",
            rich_help_panel="Output",
        ),
    ] = None,
    summary: Annotated[
        Path | None,
        typer.Option(
            "--summary",
            metavar="FILE",
            help="Append the summary (Markdown) to this file.",
            rich_help_panel="Output",
        ),
    ] = None,
    as_json: Json = False,
    force: Force = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Run the steps that a recipe has: calibrate, analyze, budget, eval, export.

    Steps whose inputs (section, model, data, tool, earlier steps) have not
    changed are kept, so an interrupted run continues. The export is made
    aside, verified, and published last. Exit code 3 when no layer qualifies,
    no schedule fits the budget or a gate fails; then nothing is exported.
    """
    begin(quiet, verbose)
    from vtwcli.machine.distributed import finish, is_main
    from vtwcli.pipeline.plan import execute, prepare
    from vtwcli.pipeline.run import alone
    from vtwcli.pipeline.summary import check_summary, plan_view, summary_view, write_summary

    loaded = recipe_of({"recipe": recipe, "sets": sets, "trust_remote_code": trust_remote_code})
    folder = output or Path(loaded.output or f"vtw-run-{recipe.stem}")
    text = recipe.read_text(encoding="utf-8")
    work = prepare(loaded, folder, text=text, only=only or (), start=start, force=force, file=recipe)
    if summary is not None:
        check_summary(summary, work)
    if dry_run:
        if as_json:
            console.result_text(document(work.document()))
        else:
            console.result_text(plan_view(work))
        return
    console.note(plan_view(work))
    with alone(work):
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
        if as_json:
            console.result_text(document(found))
        else:
            console.result_text(summary_view(work))
    finish()
    if work.failure and is_main():
        earlier = f"; {folder / 'model'} is of an earlier run" if (folder / "model").exists() else ""
        raise GateError(work.failure, "later steps did not run" + earlier)
