"""The first of the two cuts of arXiv 2409.01162: tokens before the knee of the similarity to the class token.

No code was published, and of the paper its abstract alone was at hand. Guessed are the similarity (cosine of what
the projector reads), the knee (farthest below the line between the ends of the falling curve), and that the knee's
token stays. The second cut, of tokens unlike the text inside the language model, is not part of it. A ratio or a
count takes the place of the knee. Without a class token the curve is that of the mean attention that a token
receives.
"""

from __future__ import annotations

from typing import ClassVar

from vtwcli.methods.in_front import InFront, found
from vtwcli.methods.method import Style


class TwoCuts(InFront):
    """What is most like the class token, up to the knee of the curve."""

    key: ClassVar[str] = "two_cuts"
    title: ClassVar[str] = "knee of the class similarity"
    paper: ClassVar[str | None] = "2409.01162"
    style: ClassVar[Style] = Style("#000000", "1", "knee of the class similarity")
    score: ClassVar[str] = "tower_two_cuts"

    ratio: float | None = found("share of each image's tokens that stay, rounded up, in place of the knee")
