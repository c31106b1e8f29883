"""HoloV: quotas of crops by attention and by how varied they are (arXiv 2510.02912).

Crops are consecutive ranges of tokens; inside a crop those that the class token attends to most stay. As in the
published code a crop that gets more than it has leaves rows of zeros at the end; the paper's temperature and its
fetching again are not in that code. Without a class token the mean attention that a token receives takes the place
of the class token's.
"""

from __future__ import annotations

from typing import ClassVar

from vtwcli.methods.in_front import InFront, parameter
from vtwcli.methods.method import Style


class HoloV(InFront):
    """Quotas of crops, filled by attention."""

    key: ClassVar[str] = "holov"
    title: ClassVar[str] = "HoloV"
    paper: ClassVar[str | None] = "2510.02912"
    style: ClassVar[Style] = Style("#009E73", "s", "HoloV")
    score: ClassVar[str] = "tower_holov"

    crops: int = parameter("tower_holov", "crops", "number of consecutive ranges")
    weight: float = parameter("tower_holov", "weight", "of variety against attention in a crop's quota")
