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
    from vtwcli.report.tables import fitting_columns, terminal_table

    header = ("family", "example", "withdraw", "sweep", "analyze", "tower", "onnx")
    shown = fitting_columns(header, rows, ["example"], console.stdout().width)
    console.result(terminal_table(shown, [[row[name] for name in shown] for row in rows], left=shown))
    if "example" not in shown:
        console.result("\nA wider terminal, and --json, name an example of each.")
    for note in dict.fromkeys(row["notes"] for row in rows if row["notes"]):
        console.result(
            "\n" + ", ".join(row["family"] for row in rows if row["notes"] == note) + f":\n  {note}"
        )
