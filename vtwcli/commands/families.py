"""``vtw families``."""

from __future__ import annotations

from typing import Any

from vtwcli.commands.flags import JSON, flags
from vtwcli.io import console
from vtwcli.io.files import document

EXAMPLES = """
Examples:

  vtw families

  vtw families --json | jq -r '.[] | select(.onnx == "yes") | .example'

Try the tool on the model that comes with it:  vtw calibrate demo
"""


@flags(JSON)
def command(**given: Any) -> None:
    """List the model families, what works with each, and what to know."""
    from vtwcli.models.families import table

    rows = table()
    if given["json"]:
        console.result_text(document(rows))
        return
    from rich.table import Table

    view = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("family", "example", "withdraw", "sweep", "analyze", "tower", "onnx"):
        view.add_column(name, overflow="fold")
    for row in rows:
        view.add_row(*(row[str(column.header)] for column in view.columns))
    console.result(view)
    for note in dict.fromkeys(row["notes"] for row in rows if row["notes"]):
        console.result(
            "\n" + ", ".join(row["family"] for row in rows if row["notes"] == note) + f":\n  {note}"
        )
