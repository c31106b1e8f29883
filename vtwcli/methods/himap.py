"""HiMAP: first what text reads stays, then what the visual tokens read of each other (arXiv id not verified).

Before layer 2 visual tokens are ranked by the attention that the rows of text behind the image paid them in layer 1,
before layer 8 by what the remaining visual rows paid in layer 7, each the mean over heads and over those rows; of 576
tokens 288 and then 72 stay, with their positions. The second ranking is causal, as in the published code: early tokens
have more readers. That code has no cache, so that with every generated token the rows behind the image are one more and
the ranking is another; here the prompt decides, and with ``use_cache=False`` every step is a prompt of its own, which
is the published run. For models of another depth layer l of 32 is round(l L / 32).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field, model_validator

from vtwcli.methods.method import Style
from vtwcli.methods.staged import Layers, Shares, Staged
from vtwcli.schedule.schedule import Keep, Select


class HiMAP(Staged):
    """Rank by text, then by vision."""

    key: ClassVar[str] = "himap"
    title: ClassVar[str] = "HiMAP"
    style: ClassVar[Style] = Style("#0072B2", "p", "HiMAP")

    layers: Layers = Field((2, 8), description="first layer of each stage, with the chosen tokens only")
    ratios: Shares = Field(
        (0.5, 0.125),
        description="share of the prompt's visual tokens that stays at each, rounded down; one number: at all",
    )

    @model_validator(mode="after")
    def _two_stages(self) -> HiMAP:
        if len(self.layers) > 2:
            raise ValueError("HiMAP has two stages, one by text and one by vision")
        return self

    def stage(self, number: int, at: int, amount: Mapping[str, Any]) -> Keep:
        rows = "visual" if number else "text"
        return Keep(at=at, action="keep", select=Select(score="attention", rows=rows, **amount))
