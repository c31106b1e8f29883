"""``vtw env``."""

from __future__ import annotations

from typing import Any

from vtwcli.commands.flags import JSON, flags
from vtwcli.io import console
from vtwcli.io.files import document

EXAMPLES = """
Examples:

  vtw env

  vtw env --json | jq -r .libraries.transformers.installed

Then:  vtw calibrate demo
"""


@flags(JSON)
def command(**given: Any) -> None:
    """Say what is installed, and against what it was tested."""
    from vtwcli.machine.releases import environment, untested

    report = environment()
    if given["json"]:
        console.result_text(document(report))
        return
    lines = [f"vtw {report['vtwcli']}, Python {report['python']}, {report['platform']}"]
    for name, entry in report["libraries"].items():
        bounds = f"  (wanted {entry['wanted']})" if entry["wanted"] else ""
        lines.append(f"{name:16} {entry['installed'] or 'not installed'}{bounds}")
    lines.append(f"tested with transformers {', '.join(report['tested']['transformers'])}")
    console.result_text("\n".join(lines))
    if sentence := untested(report["libraries"]["transformers"]["installed"]):
        console.warn(sentence)
