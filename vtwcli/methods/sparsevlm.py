"""SparseVLM and SparseVLM+: what the text that suits the image reads (arXiv 2410.04417).

Raters are chosen once, among the rows of text behind the image: of the dot products of the embedded image with the
embedded text, in a softmax over the text, a rater has more than the mean, in the mean over visual rows. Behind layers
2, 6 and 15, that is before layers 3, 7 and 16, visual tokens are ranked by the attention that raters paid them there,
in the mean over heads.

SparseVLM recycles: of n tokens that leave, the int(0.3 n) + 1 = m best are merged into int(m / 10) + 1 clusters by
DPC-kNN, whose means stand behind the kept tokens, and positions close up. Equal densities are told apart by noise of
1e-6, which the published code draws without a seed. The paper derives how many stay from the rank of the attention
matrix; the published code has fixed numbers, and so has this. Of n tokens that code keeps at most n - 1; here all of
them stay where so many are wanted.

SparseVLM+ drops and keeps positions; its weights are divided by what the rotary embedding makes of rows of ones, and
only the 14 of 32 heads count that read most. A model with fewer heads takes all of them: give ``heads``.

Published are the numbers for ``tokens`` 192, 128, 96 and 64 of 576, here shares of the prompt's visual tokens. For
models of another depth layer l of 32 is round(l L / 32).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field, model_validator

from vtwcli.methods.method import Style
from vtwcli.methods.staged import PUBLISHED_VISUAL, Layers, Shares, Staged
from vtwcli.schedule.schedule import Keep, Rest, Select

COUNTS = {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)}
COUNTS_PLUS = {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)}


def _shares(counts: tuple[int, ...]) -> tuple[float, ...]:
    return tuple(count / PUBLISHED_VISUAL for count in counts)


class SparseVLM(Staged):
    """Rank by raters, recycle what leaves."""

    key: ClassVar[str] = "sparsevlm"
    title: ClassVar[str] = "SparseVLM"
    paper: ClassVar[str | None] = "2410.04417"
    style: ClassVar[Style] = Style("#CC79A7", "<", "SparseVLM")
    compact: ClassVar[bool] = True
    published: ClassVar[Mapping[int, tuple[int, ...]]] = COUNTS

    layers: Layers = Field((3, 7, 16), description="first layer of each stage, with the chosen tokens only")
    ratios: Shares = Field(
        _shares(COUNTS[192]),
        description="share of the prompt's visual tokens that stays at each, rounded down; one number: at all",
    )
    tokens: int | None = Field(
        None, description="published ratios by their number of tokens: 192, 128, 96 or 64"
    )
    seed: int = Field(0, ge=0, description="of the noise in the clusters")

    @model_validator(mode="after")
    def _ratios_of_tokens(self) -> SparseVLM:
        if self.tokens is None:
            return self
        if others := sorted({"ratios", "counts"} & self.model_fields_set):
            raise ValueError(f"give one of tokens and {others[0]}")
        if self.tokens not in self.published:
            raise ValueError(f"tokens: {self.tokens} is not one of {', '.join(map(str, self.published))}")
        return self

    def shares(self) -> tuple[float, ...]:
        counts = self.published.get(self.tokens or 0)  # unknown ones are refused above
        return self.ratios if counts is None else _shares(counts)

    def stage(self, number: int, at: int, amount: Mapping[str, Any]) -> Keep:
        select = Select(score="attention", rows="raters", **amount)
        rest = Rest(merge="cluster", seed=self.seed)
        return Keep(at=at, action="keep", select=select, positions="compact", rest=rest)


class SparseVLMPlus(SparseVLM):
    """Rank by raters in the heads that read most, whatever the distance; nothing is merged."""

    key: ClassVar[str] = "sparsevlm_plus"
    title: ClassVar[str] = "SparseVLM+"
    style: ClassVar[Style] = Style("#CC79A7", ">", "SparseVLM+")
    compact: ClassVar[bool] = False
    published: ClassVar[Mapping[int, tuple[int, ...]]] = COUNTS_PLUS

    ratios: Shares = Field(
        _shares(COUNTS_PLUS[192]),
        description="share of the prompt's visual tokens that stays at each, rounded down; one number: at all",
    )
    heads: int = Field(14, ge=1, description="number of heads that count; more than there are: all")

    def stage(self, number: int, at: int, amount: Mapping[str, Any]) -> Keep:
        select = Select(score="attention", rows="raters", heads=self.heads, level=True, **amount)
        return Keep(at=at, action="keep", select=select)
