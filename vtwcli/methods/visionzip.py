"""VisionZip: dominant tokens of the class attention, the others merged into contextual ones (arXiv 2412.04467).

In the vision tower's layer before the last the class token's attention, summed over heads, ranks the patches. The
class token itself and the best are dominant; of the others every n-th is a target that the remaining join by the
similarity of their keys. As in the published code the class token goes to the language model, and a target's row
is its feature plus the mean of those that came to it (the paper averages all of them). The default is the smallest
published setting, 54 and 10 of 576 rows. Without a class token the mean attention that a token receives takes the
place of the class token's.
"""

from __future__ import annotations

from typing import ClassVar

from vtwcli.methods.in_front import InFront, parameter
from vtwcli.methods.method import Style


class VisionZip(InFront):
    """Rows of the class token, of what it attends to, and of means of the rest."""

    key: ClassVar[str] = "visionzip"
    title: ClassVar[str] = "VisionZip"
    paper: ClassVar[str | None] = "2412.04467"
    style: ClassVar[Style] = Style("#56B4E9", "p", "VisionZip")
    score: ClassVar[str] = "tower_visionzip"

    contextual: int | None = parameter(
        "tower_visionzip", "contextual", "how many of the rows are merged ones; by default 10 of 64"
    )
