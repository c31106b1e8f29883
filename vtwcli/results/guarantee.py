"""What result documents say of a promise; see ``judge.guarantee``."""

from __future__ import annotations

from typing import NotRequired

from typing_extensions import TypedDict

from vtwcli.results.document import Count


class Tested(TypedDict):
    """A candidate that was tested."""

    layer: NotRequired[int]
    """Of VTW: withdrawal at this layer."""
    candidate: NotRequired[str]
    """Of a method that is searched: its name."""
    loss: dict[str, float]
    """Mean over a task's samples."""
    p_value: dict[str, float]
    """By task."""
    holds: bool
    """Whether no task's p-value exceeds 1 - confidence."""


class Guarantee(TypedDict):
    """What is promised of the choice, and how it was tested.

    The promise: with the confidence, the mean loss of each task over its population is at most the risk.
    """

    risk: float
    confidence: float
    loss: str
    """``tokens``, ``answer``, ``kl`` or ``metric``."""
    test: str
    """``binomial`` or ``hoeffding-bentkus``."""
    population: list[str]
    """What samples were drawn from, a source each; inputs of other kinds are not promised anything."""
    samples: dict[str, Count]
    """Distinct samples that were tested, by task."""
    ordered_on: NotRequired[dict[str, Count]]
    """Of a method that is searched: other samples, which gave the candidates and their order; by task."""
    tested: list[Tested]
    """In the order of the tests, the safest candidate first; no further ones were tested."""
