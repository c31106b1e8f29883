"""PruneSID: groups by principal components, in each what suppression leaves (arXiv 2603.09480).

The class token's row goes to the language model first. Components are exact where the published code takes random
low-rank ones, so nothing is drawn and there is no seed. Without a class token the mean attention that a token
receives takes the place of the class token's.
"""

from __future__ import annotations

from typing import ClassVar

from vtwcli.methods.in_front import InFront, published
from vtwcli.methods.method import Style


class PruneSID(InFront):
    """Groups of alike tokens give what is not redundant."""

    key: ClassVar[str] = "prunesid"
    title: ClassVar[str] = "PruneSID"
    paper: ClassVar[str | None] = "2603.09480"
    style: ClassVar[Style] = Style("#CC79A7", "*", "PruneSID")
    score: ClassVar[str] = "tower_prunesid"

    ratio: float | None = published(192)
