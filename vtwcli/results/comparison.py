"""The result document of ``vtw budget``, and the rows of schedules that were run on the same samples.

L layers; KL in nats.
"""

from __future__ import annotations

from typing import Any, Final, Literal, NotRequired

from typing_extensions import TypedDict

from vtwcli.results.document import Files, ModelRecord, Origin, RunRecord, TokenCounts, Unchecked

FORMAT: Final = "vtw-budget"
FORMAT_VERSION: Final = 1
BUDGET = Files(FORMAT, "budget", {"schedule": ".schedule.yaml", "plot": ".png"})


class TriedRow(TypedDict):
    """A schedule that was run: how far it is from the full model, and what it costs."""

    name: str
    """For tables and plots."""
    method: str
    """Its name in ``METHODS``."""
    parameters: dict[str, Any]
    """What the method made it from."""
    kl: float
    """Mean over samples, each the mean over its positions, nats."""
    kl_by_task: dict[str, float]
    """The same for each task."""
    worst_kl: float
    """Of the worst task."""
    agreement: float
    """Share of positions whose most likely token is the full model's, mean over samples."""
    flops_ratio: dict[str, float]
    """Of all prompts' prefill, relative to the full model's, by convention."""
    kv_ratio: float
    """Entries of the KV cache behind all prompts, relative to the full model's."""
    visual_tokens: list[float]
    """Mean number that is present in each layer, [L]."""
    schedule: dict[str, Any]
    """In canonical form."""


class ComparedRow(TriedRow):
    """One of several schedules."""

    pareto: bool
    """Whether no other is both cheaper and closer to the full model."""
    tokens: NotRequired[float]
    """At equal cost: how many visual tokens a layer was to hold on average."""
    scores: NotRequired[dict[str, float]]
    """At equal cost: each task's metric of the schedule's own answers."""


class FullScore(TypedDict):
    """A task's metric of the full model's answers."""

    metric: str
    """Its name."""
    value: float
    """Its value."""


class LeftOut(TypedDict):
    """A method that is not there at equal cost."""

    method: str
    """Its name in ``METHODS``."""
    tokens: list[float]
    """At which numbers of tokens."""
    why: str
    """The reason."""


class TaskCount(TypedDict):
    """A task of the samples."""

    samples: int
    """How many have visual tokens."""


class BudgetRun(RunRecord):
    """The run of a comparison."""

    streamed: NotRequired[Unchecked[bool]]
    """Whether layers were read from disk one at a time; older documents do not say."""


class Budget(Origin):
    """What each method's schedules cost and change. Only ``run`` differs between equal runs."""

    format: Literal["vtw-budget"]
    format_version: Literal[1]
    model: ModelRecord
    num_layers: int
    """L."""
    options: dict[str, Any]
    """The command's section."""
    rule: dict[str, Any]
    """Parameters of the recipe's schedule section, which methods may keep fixed."""
    cost: TokenCounts
    tasks: dict[str, TaskCount]
    candidates: list[ComparedRow]
    pareto: list[str]
    """Names of the front, the cheapest first."""
    scores: NotRequired[dict[str, FullScore]]
    """At equal cost: by task, for those with references."""
    left_out: NotRequired[list[LeftOut]]
    """At equal cost: which methods are missing, and why."""
    max_flops: float | None
    """The budget, relative to the full model's FLOPs."""
    best: str | None
    """The name of the schedule closest to the full model within the budget; None where there is none."""
    run: NotRequired[BudgetRun]
