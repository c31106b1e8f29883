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
    """Say what is installed, against what it was tested, and what this machine is: for a bug report."""
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
    machine = report["machine"]
    total, free = (machine["memory"][key] / 2**30 for key in ("total", "available"))
    devices = [f"{one['name']} with {one['memory'] / 2**30:.0f} GiB" for one in machine["devices"]]
    lines.append(f"{machine['cpus']} CPUs, {total:.0f} GiB of memory, {free:.0f} GiB available")
    lines.append(f"CUDA: {', '.join(devices) or 'no device'}")
    lines += [f"{name} cache: {place}" for name, place in machine["caches"].items()]
    lines.append(
        "set: " + (", ".join(f"{key}={one}" for key, one in machine["switches"].items()) or "nothing")
    )
    console.result_text("\n".join(lines))
    if sentence := untested(report["libraries"]["transformers"]["installed"]):
        console.warn(sentence)
