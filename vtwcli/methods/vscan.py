"""VScan: a local and a global scan, the others merged into the kept (arXiv 2505.22654).

Half of the tokens come in equal shares from 4 x 4 windows of the image, by the class token's attention in an early
layer (5 of 24, scaled); half are the most attended in the layer before the last; every other token joins the most
similar kept one as a plain mean. This is what happens in front of the language model; the published method cuts
once more at half its depth, from 96 to 32 of 576 for 64 on average. Without a class token the mean attention that
a token receives takes the place of the class token's.
"""

from __future__ import annotations

from typing import ClassVar

from vtwcli.methods.in_front import InFront, parameter, published
from vtwcli.methods.method import Style


class VScan(InFront):
    """Local and global scan, with merging."""

    key: ClassVar[str] = "vscan"
    title: ClassVar[str] = "VScan"
    paper: ClassVar[str | None] = "2505.22654"
    style: ClassVar[Style] = Style("#0072B2", "X", "VScan")
    score: ClassVar[str] = "tower_vscan"

    ratio: float | None = published(96)
    side: int = parameter("tower_vscan", "side", "windows along each side of the image")
