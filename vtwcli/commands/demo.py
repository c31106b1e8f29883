"""``vtw demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vtwcli.commands.flags import FORCE, WORDS, flag, flags
from vtwcli.commands.options import begin

EXAMPLES = """
Examples:

  vtw demo

  vtw demo --task count --limit 5 --output tour

Its first step alone:  vtw calibrate demo
"""


@flags(
    flag("limit", int, "Questions of each task that are looked at.", min=2, default=10),
    flag(
        "task",
        str,
        "What the last step asks about: colour, shape, existence, count or caption.",
        default="caption",
    ),
    flag(
        "output",
        Path,
        "Directory of the results.",
        "-o",
        metavar="DIR",
        panel="Output",
        default=Path("vtw-tour"),
    ),
    FORCE,
    WORDS,
)
def command(**given: Any) -> None:
    """Take the tour: curve, profile, export, check, and one question answered full and pruned.

    Needs a minute or two and nothing but this package: it runs on the small
    trained model that comes with it, and names the command behind each step.
    """
    begin(given)
    from vtwcli.tour import tour

    tour(given["output"], given["limit"], given["task"], given["force"])
