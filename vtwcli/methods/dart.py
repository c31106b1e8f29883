"""DART: of visual tokens that are like one another one is enough (arXiv 2502.11494).

Before layer 2 pivots are chosen: the four visual tokens and the four tokens of text behind the image whose keys in
layer 1 have the largest sum of absolute values. In the order of the sequence each pivot takes, of the visual tokens
that are left, the m that are least like it: with the smallest cosine between the rows that enter layer 2, each through
the model's last norm. The four visual pivots and 8 m others stay, with their positions; m is int(N r / 8) of N tokens,
where r is the share to be left.

The published code goes through its pivots as a Python set orders them; here they are sorted. The keys are those of the
cache, behind the rotary embedding, as in the code's patched attention. Its scripts leave r = 0.333, 0.222 and 0.111 of
576: 188, 124 and 60 tokens. For models of another depth layer 2 of 32 is round(2 L / 32), at least 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from vtwcli.methods.method import Style
from vtwcli.methods.staged import Layers, Shares, Staged
from vtwcli.schedule.schedule import Keep, Select


class Dart(Staged):
    """Keep what is least like a few pivots."""

    key: ClassVar[str] = "dart"
    title: ClassVar[str] = "DART"
    paper: ClassVar[str | None] = "2502.11494"
    style: ClassVar[Style] = Style("#E69F00", "s", "DART")

    layers: Layers = Field((2,), description="first layer with the chosen tokens only")
    ratios: Shares = Field(
        (0.333,),
        description="share of the prompt's visual tokens to be left, in eighths of which each pivot takes one",
    )

    def stage(self, number: int, at: int, amount: Mapping[str, Any]) -> Keep:
        return Keep(at=at, action="keep", select=Select(score="duplication", **amount))
