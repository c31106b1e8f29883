"""``vtw recipe``: schema, check, init."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from vtwcli.commands.flags import FORCE, MODEL_HELP, argument, flag, flags
from vtwcli.errors import UsageError
from vtwcli.io import console
from vtwcli.io.files import document

EXAMPLES = """
Examples:

  vtw recipe init demo > demo.yaml && vtw recipe check demo.yaml && vtw run demo.yaml

  vtw recipe schema > recipe.schema.json
"""

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Start a recipe, check one, or print the schema for an editor.",
    epilog=EXAMPLES,
)


@app.command("init")
@flags(
    argument("model", str, "MODEL", MODEL_HELP, default="demo"),
    flag("output", Path, "Write here instead of to stdout.", "-o", metavar="FILE"),
    FORCE,
)
def init(**given: Any) -> None:
    """Write a commented starter that shows every option with its default."""
    from vtwcli.io.outputs import Outputs, inputs_of
    from vtwcli.recipe.starter import starter

    model, output = given["model"], given["output"]
    if output is None:
        console.result_text(starter(model))
    else:
        outputs = Outputs({"result": output}, "recipe", given["force"])
        outputs.check(inputs_of({"the model": model}))
        with outputs.publish() as new:
            new.text("result", starter(model))
        console.note(f"wrote {output}")


@app.command("check")
@flags(argument("recipes", list[Path], "FILE...", "Recipe files, YAML or JSON."))
def check(**given: Any) -> None:
    """Say whether recipes are valid, and which steps they have; exit code 2 when one is not.

    Tells every problem of every file. Looks at the files alone, and at a
    schedule that one names: not at the environment, the model or the data.
    """
    from vtwcli.pipeline.steps import check_recipe

    wrong = False
    for path in given["recipes"]:
        words, problems = check_recipe(path)
        for problem in problems:
            console.error(problem.message, problem.hint)
        if problems:
            wrong = True
        else:
            console.result_text(f"{path}: valid: {words}")
    if wrong:
        raise typer.Exit(UsageError.exit_code)


@app.command("schema")
def schema() -> None:
    """Print the JSON schema of recipes; editors complete and check with it."""
    from vtwcli.recipe.schema import json_schema

    console.result_text(document(json_schema()))
