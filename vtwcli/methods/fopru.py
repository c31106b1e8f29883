"""FoPru: what the patches of an image attend to in the vision tower (arXiv 2411.14164).

Of each image stay the tokens that receive most attention, mean over heads and query rows: by ``rank`` the best tokens,
by ``row`` whole rows of the token grid, those with the largest sums. No code was published; that the layer is the last
but one, whose features LLaVA reads, is a guess. By ``row`` as many whole rows stay as the number of tokens allows, at
least one.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from vtwcli.methods.in_front import InFront
from vtwcli.methods.method import Style


class FoPru(InFront):
    """Keep what receives most attention in the vision tower, as tokens or rows; a quarter by default."""

    key: ClassVar[str] = "fopru"
    title: ClassVar[str] = "FoPru"
    paper: ClassVar[str | None] = "2411.14164"
    style: ClassVar[Style] = Style("#0072B2", "<", "FoPru")
    score: ClassVar[str] = "tower_received"

    ratio: float = Field(0.25, gt=0, le=1, description="share of each image's tokens that stay, rounded up")
    strategy: Literal["rank", "row"] = Field(
        "rank", description="the best tokens, or the best rows of the grid"
    )

    def parameters(self) -> dict[str, Any]:
        return {"per": "row"} if self.strategy == "row" else {}
