"""HiPrune: anchors of a middle layer with their neighbours, the rest from the end of the tower (arXiv 2508.00553).

Both layers' scores are the attention that a token receives, mean over heads and all rows, so it needs no class
token. The object layer is the ninth of 24, scaled to the tower's depth; neighbours are those of the image's grid.
"""

from __future__ import annotations

from typing import ClassVar

from vtwcli.methods.in_front import InFront, parameter, published
from vtwcli.methods.method import Style


class HiPrune(InFront):
    """Anchors, the tokens around them, and what is attended to at the end."""

    key: ClassVar[str] = "hiprune"
    title: ClassVar[str] = "HiPrune"
    paper: ClassVar[str | None] = "2508.00553"
    style: ClassVar[Style] = Style("#E69F00", "p", "HiPrune")
    score: ClassVar[str] = "tower_hiprune"

    ratio: float | None = published(192)
    alpha: float = parameter("tower_hiprune", "alpha", "share for anchors and the tokens around them")
    object_layer: int = parameter("tower_hiprune", "object_layer", "anchors' layer, as of a tower with 24")
