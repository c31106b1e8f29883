"""PyramidDrop: visual tokens leave in stages, half of them at each (arXiv 2410.17247).

Before layers 8, 16 and 24 the visual tokens are ranked by the attention of the prompt's last row, mean over heads, as
the layer about to run sees it: its own norm, queries and keys, on the rows that are left and at the positions that
these have. Of the N tokens of the prompt int(N / 2), int(N / 4) and int(N / 8) stay, and all rows are numbered anew, so
that text moves up to the image; in each layer the position of an answer token is the number of rows before it there.

The paper describes the same. The published code ranks with keys that it does not repeat for grouped queries, and so
runs on models without these only; here they are repeated, as in the layer itself. For models of another depth layer l
of 32 is round(l L / 32).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from vtwcli.methods.method import Style
from vtwcli.methods.staged import Layers, Shares, Staged
from vtwcli.schedule.schedule import Keep, Select


class PyramidDrop(Staged):
    """Rank by the layer's own attention, in stages; positions close up."""

    key: ClassVar[str] = "pyramiddrop"
    title: ClassVar[str] = "PyramidDrop"
    paper: ClassVar[str | None] = "2410.17247"
    style: ClassVar[Style] = Style("#D55E00", "h", "PyramidDrop")
    compact: ClassVar[bool] = True

    layers: Layers = Field((8, 16, 24), description="first layer of each stage, with the chosen tokens only")
    ratios: Shares = Field(
        (0.5, 0.25, 0.125),
        description="share of the prompt's visual tokens that stays at each, rounded down; one number: at all",
    )

    def stage(self, number: int, at: int, amount: Mapping[str, Any]) -> Keep:
        select = Select(score="attention", layer="here", **amount)
        return Keep(at=at, action="keep", select=select, positions="compact")
