"""VisPruner: half by class attention, the other half without near twins (arXiv 2412.01818, its second version).

Half of the tokens are those that the class token attends to most in the vision tower's layer before the last;
among the others, again and again, eight of those most similar to some other leave. Without a class token the mean
attention that a token receives takes the place of the class token's.
"""

from __future__ import annotations

from typing import ClassVar

from vtwcli.methods.in_front import InFront, parameter
from vtwcli.methods.method import Style


class VisPruner(InFront):
    """Important tokens and diverse ones."""

    key: ClassVar[str] = "vispruner"
    title: ClassVar[str] = "VisPruner"
    paper: ClassVar[str | None] = "2412.01818"
    style: ClassVar[Style] = Style("#56B4E9", "o", "VisPruner")
    score: ClassVar[str] = "tower_vispruner"

    important: float = parameter(
        "tower_vispruner", "important", "share of the tokens chosen by attention alone"
    )
