"""DivPrune: the tokens that are farthest from each other (arXiv 2503.02175).

Greedily the largest smallest cosine distance of the language model's input rows; nothing of the vision tower is
looked at. The published default is a ratio of 0.098, rounded to 56 of 576.
"""

from __future__ import annotations

from typing import ClassVar

from vtwcli.methods.in_front import InFront, published
from vtwcli.methods.method import Style


class DivPrune(InFront):
    """Maximise the smallest distance between kept tokens."""

    key: ClassVar[str] = "divprune"
    title: ClassVar[str] = "DivPrune"
    paper: ClassVar[str | None] = "2503.02175"
    style: ClassVar[Style] = Style("#CC79A7", "D", "DivPrune")
    score: ClassVar[str] = "tower_divprune"

    ratio: float | None = published(56)
