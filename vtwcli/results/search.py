"""The result document of ``vtw budget --search``.

L layers; KL in nats.
"""

from __future__ import annotations

from typing import Any, Final, Literal, NotRequired

from typing_extensions import TypedDict

from vtwcli.results.calibration import SearchedSample
from vtwcli.results.comparison import BudgetRun, TaskCount, TriedRow
from vtwcli.results.document import Count, Files, ModelRecord, Origin, TokenCounts
from vtwcli.results.guarantee import Guarantee

FORMAT: Final = "vtw-search"
FORMAT_VERSION: Final = 1
SEARCH = Files(FORMAT, "search", {"schedule": ".schedule.yaml", "plot": ".png"})


class FoundRow(TriedRow):
    """A schedule that came through the search, on the samples that choose."""

    worst_agreement: float
    """Share of positions whose most likely token is the full model's, in the worst task."""
    meets: bool
    """Whether it meets every goal."""
    pareto: bool
    """Whether no other is both cheaper and, in its worst task, closer to the full model."""


class Rung(TypedDict):
    """A step of the halving."""

    schedules: Count
    """How many were measured."""
    samples: Count
    """On how many samples, those of earlier rungs among them."""


class Unsearched(TypedDict):
    """Methods whose schedules could not be tried."""

    methods: list[str]
    """Their names in ``METHODS``."""
    why: str
    """The reason."""


class Search(Origin):
    """The schedules within a goal, the best of them, and what is promised of it. Only ``run`` differs between equal
    runs that no limit of time ended.
    """

    format: Literal["vtw-search"]
    format_version: Literal[1]
    model: ModelRecord
    num_layers: int
    """L."""
    options: dict[str, Any]
    """The command's section."""
    rule: dict[str, Any]
    """Parameters of the recipe's schedule section, which methods may keep fixed."""
    goals: dict[str, float]
    """Those of the options that are given."""
    positions: str
    """``answer``."""
    eta: float
    """Of the loss ``kl``, nats."""
    parts: dict[str, dict[str, Count]]
    """Distinct samples with visual tokens by task, of the disjoint parts ``search`` and ``choose``; ``guarantee`` has
    its own."""
    rungs: list[Rung]
    """The halving, from many schedules on few samples to few on many."""
    stopped: bool
    """Whether the limit of time ended it."""
    left_out: list[Unsearched]
    """What was not tried."""
    cost: TokenCounts
    tasks: dict[str, TaskCount]
    """Of the part that chooses."""
    candidates: list[FoundRow]
    """What came through; a schedule's ``method`` is ``combination`` where no method makes it."""
    pareto: list[str]
    """Names of the front, the cheapest first."""
    best: str | None
    """The closest schedule within a goal of cost, else the cheapest that is close enough; None where there is none."""
    promised: bool
    """Whether the promise holds for the best."""
    proven: float | None
    """The smallest risk that the samples prove of the best with the confidence; None where it was not tested."""
    schedule: dict[str, Any] | None
    """The best, in canonical form."""
    samples: list[SearchedSample]
    """Of all three parts."""
    guarantee: NotRequired[Guarantee]
    """How the promise was tested; missing where nothing meets the goals."""
    run: NotRequired[BudgetRun]
