"""The result document of ``vtw calibrate``: of VTW curves over the layers, of a method that is searched candidates.

S samples, L layers, R compared positions of a sample; KL in nats. Nothing but ``run`` differs between equal runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal, NotRequired, TypeAlias, cast

from pydantic import AfterValidator, Field, with_config
from typing_extensions import TypedDict, TypeIs

from vtwcli.results.comparison import ComparedRow, TaskCount
from vtwcli.results.document import (
    STRICT,
    Count,
    Depth,
    Files,
    ModelRecord,
    Origin,
    Relative,
    SweepRun,
    TokenCounts,
    Unchecked,
    has_convention,
)
from vtwcli.results.guarantee import Guarantee

FORMAT: Final = "vtw-calibration"
FORMAT_VERSION: Final = 1
CALIBRATION = Files(FORMAT, "calibration", {"schedule": ".schedule.yaml", "plot": ".png"})


class Compromise(TypedDict):
    """The candidate to name when none qualifies."""

    layer: Count
    kl: float
    """Mean over samples."""


class CalibratedTask(TypedDict):
    """One task by itself."""

    samples: Count
    """How many of it have visual tokens."""
    withdrawal_layer: Count | None
    """K by the policy ``sustained`` on its samples."""
    kl: list[float]
    """Mean over its samples, [L]."""
    agreement: list[float]
    """Share of positions with the full model's most likely token, mean over its samples, [L]."""


class Curves(TypedDict):
    """KL(pruned ‖ full) when visual tokens are withdrawn at each layer."""

    mean: list[float]
    """Over samples with visual tokens, [L]."""
    samples: list[list[float]]
    """[S][L], each the mean over its positions."""
    positions: Unchecked[list[list[list[float]]]]
    """[S][L][R]."""


class Agreement(TypedDict):
    """Share of positions whose most likely token is the full model's."""

    mean: list[float]
    """Over samples with visual tokens, [L]."""
    samples: Unchecked[list[list[float]]]
    """[S][L]."""


class Cost(TokenCounts, Relative):
    """What K costs in the prompts' prefill, relative to the full model; 1 where there is no K."""

    frozen_ratio: NotRequired[Unchecked[dict[str, float]]]
    """By convention, ``flops_ratio`` if visual tokens were not updated in any layer in front of K: what freezing can
    come to at most."""


class SearchedSample(TypedDict):
    """A sample of any method's calibration."""

    id: Unchecked[str]
    fingerprint: NotRequired[str | None]
    """Of its content; such samples are left out of an evaluation."""
    task: Unchecked[str]


class CalibratedSample(SearchedSample):
    """A sample with the tokens of its prompt."""

    prefix: Unchecked[int]
    """Text tokens before the first visual one."""
    visual: Count
    """Visual tokens."""
    suffix: Unchecked[int]
    """Text tokens behind the first visual one."""
    positions: Unchecked[int]
    """R."""


@with_config(STRICT)
class VtwCalibration(Origin):
    """The withdrawal layer K. It has no key ``method``."""

    format: Literal["vtw-calibration"]
    format_version: NotRequired[Literal[1]]
    model: ModelRecord
    num_layers: Depth
    """L."""
    withdrawal_layer: Count | None
    """K: the first layer without visual tokens; None where no layer qualifies."""
    interval: Annotated[list[Count], Field(min_length=2, max_length=2)] | None
    """The 2.5 % and 97.5 % quantiles of K over resamples; None without them or where samples are too few."""
    policy: str
    eta: Annotated[float, Field(gt=0)]
    """Threshold, nats."""
    positions: str
    """``first`` or ``answer``."""
    min_layer: Count
    """The first candidate."""
    options: Unchecked[dict[str, Any]]
    """The command's section."""
    policies: Unchecked[dict[str, int | None]]
    """K by each policy."""
    compromise: NotRequired[Compromise]
    tasks: Annotated[dict[str, CalibratedTask], Field(min_length=1)]
    kl: Curves
    agreement: Agreement
    cost: Annotated[Cost, AfterValidator(has_convention)]
    schedule: dict[str, Any] | None
    """In canonical form; None where no layer qualifies."""
    samples: list[CalibratedSample]
    """[S], also those without visual tokens, which do not count."""
    guarantee: NotRequired[Unchecked[Guarantee]]
    """Of the policy ``guarantee``."""
    run: NotRequired[Unchecked[SweepRun]]


class SearchedRow(ComparedRow):
    """A candidate, and what the policy says of it."""

    quantile_kl: float
    """The high quantile of KL over samples that the policy ``quantile`` looks at."""
    accepted: bool
    """Whether the policy accepts it."""


class Boundary(TypedDict):
    """VisiPruner's shallow boundary, and the curve that it was read off."""

    layer: int
    """The first layer that cannot be muted together with all before it."""
    kl: list[float]
    """When text does not read vision in layers 0..d, mean over samples, [L]."""
    tasks: dict[str, list[float]]
    """The same for each task."""


class Outcome(Relative):
    """What a schedule does on some samples."""

    kl: float
    """Mean over samples, nats."""
    worst_kl: float
    """Of the worst task."""
    agreement: float
    """Share of positions whose most likely token is the full model's, mean over samples."""


class FixedLayer(Outcome):
    """Withdrawal at one layer for all samples."""

    layer: Count


class LeavingSample(TypedDict):
    """A sample whose visual tokens leave at a layer of its own."""

    id: str
    task: str
    layer: Count
    """At which they leave; L where they never do."""
    label: Count
    """The first from which on its own KL stays at or under eta; L where that exceeds it even at the last."""


class Exits(TypedDict):
    """Where samples leave under the choice, beside the fixed layer of the same policy.

    On the samples that the policy judged; of a promise, on those that tested it.
    """

    samples: list[LeavingSample]
    leave: list[float]
    """Share of samples that leave at each layer, and last of those that never do, [L + 1]."""
    labels: list[float]
    """The same of their labels, [L + 1]."""
    mean_layer: float
    """At which they leave, where never counts as L."""
    chosen: Outcome
    fixed: FixedLayer | None
    """What the policy chooses among plain withdrawals on the same samples; None where none of these qualifies."""


@with_config(STRICT)
class SearchedCalibration(Origin):
    """The parameters of a method that are found by running candidates."""

    format: Literal["vtw-calibration"]
    format_version: NotRequired[Literal[1]]
    method: str
    """Its name in ``METHODS``."""
    model: Unchecked[ModelRecord]
    num_layers: Depth
    """L."""
    withdrawal_layer: Unchecked[None]
    """Each sample has its own."""
    shallow_mid_layer: NotRequired[Unchecked[int | None]]
    """Of VisiPruner: chosen; None where no candidate qualifies."""
    layer_threshold: NotRequired[Unchecked[float | None]]
    """As above."""
    tokens_threshold: NotRequired[Unchecked[float | None]]
    """As above."""
    parameters: NotRequired[Unchecked[dict[str, Any]]]
    """Of other methods: what was found, each None where no candidate qualifies."""
    chosen: Unchecked[str | None]
    """The name of the candidate that was chosen; None where none qualifies."""
    compromise: Unchecked[str]
    """The name of the candidate with the smallest KL of its worst task."""
    policy: Unchecked[str]
    eta: Unchecked[float]
    """Threshold, nats."""
    positions: Unchecked[str]
    """``first`` or ``answer``."""
    options: Unchecked[dict[str, Any]]
    """The command's section."""
    rule: Unchecked[dict[str, Any]]
    """Parameters that were not searched."""
    boundary: NotRequired[Unchecked[Boundary]]
    """Of VisiPruner."""
    findings: NotRequired[Unchecked[dict[str, Any]]]
    """Of other methods: what the sweep told."""
    exits: NotRequired[Unchecked[Exits]]
    """Of an exit by attention, where a candidate qualifies."""
    candidates: Unchecked[list[SearchedRow]]
    pareto: Unchecked[list[str]]
    """Names of the front, the cheapest first."""
    cost: Unchecked[TokenCounts]
    tasks: Unchecked[dict[str, TaskCount]]
    schedule: dict[str, Any] | None
    """In canonical form; None where no candidate qualifies."""
    samples: list[SearchedSample]
    """[S], also those without visual tokens, which do not count."""
    guarantee: NotRequired[Unchecked[Guarantee]]
    """Of the policy ``guarantee``; ``candidates`` then tells what the samples say that ordered them."""
    run: NotRequired[Unchecked[SweepRun]]


Calibration: TypeAlias = VtwCalibration | SearchedCalibration


class CalibratedOn(TypedDict):
    """What an evaluation wants of calibrations: the samples that it leaves out."""

    samples: list[SearchedSample]


def is_searched(document: Calibration | Mapping[str, Any]) -> TypeIs[SearchedCalibration]:
    """Whether a calibration is of a method that is searched: VTW's names no method."""
    return document.get("method", "vtw") != "vtw"


def with_own_keys(document: SearchedCalibration, own: Mapping[str, Mapping[str, Any]]) -> SearchedCalibration:
    """A document with keys that are its method's own, each group behind the key that it is given by."""
    whole: dict[str, Any] = {}
    for key, value in document.items():
        whole[key] = value
        whole |= own.get(key, {})
    return cast(SearchedCalibration, whole)


def fits_together(document: VtwCalibration) -> VtwCalibration:
    """What no single key of VTW's calibration tells: lengths and layers that are there.

    Raises:
        ValueError: names the key.
    """
    depth, layer = document["num_layers"], document["withdrawal_layer"]
    kl, samples = document["kl"], document["samples"]
    curves = {"kl.mean": kl["mean"], "agreement.mean": document["agreement"]["mean"]}
    for name, task in document["tasks"].items():
        curves |= {f"tasks.{name}.kl": task["kl"], f"tasks.{name}.agreement": task["agreement"]}
    curves |= {f"kl.samples.{i}": row for i, row in enumerate(kl["samples"])}
    for name, curve in curves.items():
        if len(curve) != depth:
            raise ValueError(f"{name} has {len(curve)} entries, and num_layers is {depth}")
    if len(samples) != len(kl["samples"]):
        raise ValueError(f"{len(samples)} samples, but {len(kl['samples'])} rows in kl.samples")
    if not any(sample["visual"] for sample in samples):
        raise ValueError("samples: none has a visual token")
    if (layer or 0) > depth:
        raise ValueError(f"withdrawal_layer is {layer}, and num_layers is {depth}")
    if layer is None and "compromise" not in document:
        raise ValueError("compromise: required where withdrawal_layer is null")
    return document
