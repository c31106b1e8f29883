"""PruMerge+: PruMerge with evenly spaced tokens beside the outliers (arXiv 2403.15388).

About three evenly spaced tokens for each outlier, in the sequence's order; all else is as for PruMerge. With a
ratio or a count a quarter of the rows are chosen by attention, and the number of rows may be a few smaller,
because evenly spaced tokens that are already chosen are not taken twice. Without a class token the mean attention
that a token receives takes the place of the class token's.
"""

from __future__ import annotations

from typing import ClassVar

from vtwcli.methods.in_front import InFront, found, parameter
from vtwcli.methods.method import Style


class PruMergePlus(InFront):
    """Outliers and evenly spaced tokens, with what is like them."""

    key: ClassVar[str] = "prumerge_plus"
    title: ClassVar[str] = "PruMerge+"
    paper: ClassVar[str | None] = "2403.15388"
    style: ClassVar[Style] = Style("#D55E00", ">", "PruMerge+")
    score: ClassVar[str] = "tower_prumerge_plus"

    ratio: float | None = found(
        "rows at most, the extra one included, as a share, in place of what the rule finds"
    )
    neighbours: int = parameter("tower_prumerge_plus", "neighbours", "K of the nearest that a token takes in")
