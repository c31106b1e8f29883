"""``vtw methods``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vtwcli.commands.flags import JSON, argument, flags
from vtwcli.errors import UsageError
from vtwcli.io import console
from vtwcli.io.files import document
from vtwcli.methods import METHODS
from vtwcli.methods.table import about, table

if TYPE_CHECKING:
    from rich.console import Group

EXAMPLES = """
Examples:

  vtw methods

  vtw methods fastv demo

  vtw methods fastervlm llava-hf/llava-1.5-7b-hf

Compare them on your model at equal cost:  vtw budget MODEL --tokens 192,128,64
"""


@flags(
    argument(
        "method", str, "[METHOD]", "One of them, to see its rule, its parameters and its schedule.", None
    ),
    argument("model", str, "[MODEL]", "A model, for which the schedule is put into words.", None),
    JSON,
)
def command(**given: Any) -> None:
    """List the pruning methods: where they come from, what they need, whether ONNX graphs can have them.

    With METHOD its rule, its parameters and the schedule that its
    defaults make; with MODEL for that model's depth.
    """
    name, where = given["method"], given["model"]
    if name is None:
        _list(given["json"])
        return
    if name not in METHODS:
        raise UsageError(f"{name!r} is not a method", f"one of {', '.join(METHODS)}")
    shape = None
    if where is not None:
        from vtwcli.recipe.recipe import ModelSection
        from vtwcli.recipe.schedules import shape_of

        shape = shape_of(ModelSection(name=where))
    found = about(name, shape)
    if given["json"]:
        console.result_text(document(found))
        return
    console.result(_view(found))


def _list(as_json: bool) -> None:
    rows = table()
    if as_json:
        console.result_text(document(rows))
        return
    from vtwcli.report.tables import fitting_columns, terminal_table

    header = ("method", "name", "paper", "chooses", "needs", "onnx", "calibrate")
    spare = ["paper", "calibrate", "needs", "chooses"]
    shown = fitting_columns(header, rows, spare, console.stdout().width)
    console.result(terminal_table(shown, [[row[name] for name in shown] for row in rows], left=shown))
    more = "" if len(shown) == len(header) else "; a wider terminal and --json show more columns"
    console.result(f"\nvtw methods METHOD shows its rule, parameters and schedule{more}.")


def _view(found: dict[str, Any]) -> Group:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    head = f"{found['name']} ({'' if found['paper'] == 'control' else 'arXiv '}{found['paper']})"
    parts: list[Any] = [Text(head, "bold")]
    for paragraph in found["about"]:
        parts += [Text(paragraph), Text("")]
    parts.pop()
    if found["parameters"]:
        parameters = Table(box=None, pad_edge=False, header_style="bold")
        for column in ("parameter", "default", "meaning"):
            parameters.add_column(column, overflow="fold")
        for one in found["parameters"]:
            parameters.add_row(one["name"], str(one["default"]), one["help"])
        parts += [Text(""), parameters]
    if found["refused"]:
        parts += [Text(""), Text(f"Not on this model: {found['refused']}.")]
    elif found["sentences"]:
        parts += [Text(""), Text(f"Its schedule for {found['layers']} layers:")]
        parts += [Text(f"- {sentence}") for sentence in found["sentences"]]
    if found["onnx_reason"]:
        parts += [Text(""), Text(f"ONNX: no; {found['onnx_reason']}.")]
    return Group(*parts)
