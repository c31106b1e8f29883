"""CDPruner: a determinantal process over tokens, conditioned on the question (arXiv 2506.10967).

Tokens unlike each other and like the question, by greedy MAP. The published code takes relevance from CLIP's image
and text towers, negated, and uses it as the weight itself. Models carry no CLIP text tower, so the mean of the
question's embeddings takes its place, and the weight is exp(a * relevance), a = w / (2 * (1 - w)) with w the
relevance weight, as in OpenVINO GenAI.
"""

from __future__ import annotations

from typing import ClassVar

from vtwcli.methods.in_front import InFront, parameter
from vtwcli.methods.method import Style


class CDPruner(InFront):
    """Tokens unlike each other, weighted by the question."""

    key: ClassVar[str] = "cdpruner"
    title: ClassVar[str] = "CDPruner"
    paper: ClassVar[str | None] = "2506.10967"
    style: ClassVar[Style] = Style("#CC79A7", "o", "CDPruner")
    score: ClassVar[str] = "tower_cdpruner"

    relevance_weight: float = parameter(
        "tower_cdpruner", "relevance_weight", "0: diversity alone; 1: relevance as the weight itself"
    )
    negated: bool = parameter("tower_cdpruner", "negated", "prefer what is least like the question")
