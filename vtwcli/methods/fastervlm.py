"""FasterVLM: what the vision tower's class token attends to (arXiv 2412.01818, first version).

Of each image stay the tokens with the largest attention of the class token in the last vision layer but one, mean over
heads. The paper compares shares of 25, 50, 75, 90 and 95 % that leave; 64 of 576 tokens is the setting in which other
papers compare it.
"""

from __future__ import annotations

from typing import ClassVar

from vtwcli.methods.in_front import InFront
from vtwcli.methods.method import Style


class FasterVLM(InFront):
    """Keep what the class token attends to in the layer whose features LLaVA reads; 64 of 576 tokens by default."""

    key: ClassVar[str] = "fastervlm"
    title: ClassVar[str] = "FasterVLM"
    paper: ClassVar[str | None] = "2412.01818"
    style: ClassVar[Style] = Style("#D55E00", "o", "FasterVLM")
    score: ClassVar[str] = "tower_cls"
    class_token: ClassVar[bool] = True
