"""PruMerge: outliers of the last layer's class attention, neighbours added (arXiv 2403.15388).

How many tokens stay is found for each image: those whose attention is an outlier by the quartiles' rule. Each
takes in its 32 nearest patches by the similarity of keys, weighted by their attention, and one more row holds the
weighted rest. As in the published code weights are not normalised and neighbours may be kept ones (the paper
normalises, and takes neighbours among the others only). A ratio or a count fixes the number of rows, the extra one
included, instead; a number of neighbours is a number of patches whatever the image's size. Without a class token
the mean attention that a token receives takes the place of the class token's.
"""

from __future__ import annotations

from typing import ClassVar

from vtwcli.methods.in_front import InFront, found, parameter
from vtwcli.methods.method import Style


class PruMerge(InFront):
    """Outliers of the class attention, with what is like them."""

    key: ClassVar[str] = "prumerge"
    title: ClassVar[str] = "PruMerge"
    paper: ClassVar[str | None] = "2403.15388"
    style: ClassVar[Style] = Style("#D55E00", "<", "PruMerge")
    score: ClassVar[str] = "tower_prumerge"

    ratio: float | None = found(
        "rows, the extra one included, as a share of an image's tokens, in place of what the rule finds"
    )
    neighbours: int = parameter("tower_prumerge", "neighbours", "K of the nearest that a token takes in")
