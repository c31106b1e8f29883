"""V2Drop: visual tokens that a layer hardly changes can go (arXiv 2509.01552).

Before layers 3, 17 and 22 visual tokens are ranked by the length of what the layer before changed in them,
||h_l - h_(l-1)||; half of them stay, half of these, and then one. They keep their positions. No attention is looked at.
This is the published code's only setting, which its authors count as 192 tokens; the paper's others are not in it. For
models of another depth layer l of 32 is round(l L / 32).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from vtwcli.methods.method import Style
from vtwcli.methods.staged import Layers, Shares, Staged
from vtwcli.schedule.schedule import Keep, Select


class V2Drop(Staged):
    """Rank by what the layer before changed."""

    key: ClassVar[str] = "v2drop"
    title: ClassVar[str] = "V2Drop"
    paper: ClassVar[str | None] = "2509.01552"
    style: ClassVar[Style] = Style("#009E73", "d", "V2Drop")

    layers: Layers = Field((3, 17, 22), description="first layer of each stage, with the chosen tokens only")
    ratios: Shares = Field(
        (0.5, 0.25, 0.0),
        description="share of the prompt's visual tokens that stays at each, rounded down; 0: one token; one number: "
        "at all",
    )

    def amounts(self) -> list[dict[str, Any]]:
        return [{"count": 1} if one == {"share": 0} else one for one in super().amounts()]

    def stage(self, number: int, at: int, amount: Mapping[str, Any]) -> Keep:
        return Keep(at=at, action="keep", select=Select(score="change", **amount))
