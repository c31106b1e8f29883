"""Reads result files that other commands wrote, and says which key is wrong where a file is not what it should be.

The models hold what readers of the documents rely on; whatever else a document has is kept and not looked at.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from vtwcli.io import documents


class _Part(BaseModel):
    # strict: what passes is used as it stands in the file
    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False, defer_build=True)


Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(gt=0, le=1)]
Pair = Annotated[list[float], Field(min_length=2, max_length=2)]


class _Named(_Part):
    name: str


class _Compromise(_Part):
    layer: Count
    kl: float


class _CalibratedTask(_Part):
    samples: Count
    withdrawal_layer: Count | None
    kl: list[float]
    agreement: list[float]


class _Curves(_Part):
    mean: list[float]
    samples: list[list[float]]


class _Agreement(_Part):
    mean: list[float]


class _CalibrationCost(_Part):
    convention: str
    visual_tokens: float
    text_tokens: float
    flops_ratio: dict[str, float]
    kv_ratio: float

    @model_validator(mode="after")
    def _has_its_convention(self) -> _CalibrationCost:
        if self.convention not in self.flops_ratio:
            raise ValueError(f"flops_ratio has no entry for the convention {self.convention!r}")
        return self


class _Sample(_Part):
    fingerprint: str | None = None


class _CalibratedSample(_Sample):
    visual: Count


class _VtwCalibration(_Part):
    format: Literal["vtw-calibration"]
    format_version: Literal[1] = 1
    model: _Named
    num_layers: Annotated[int, Field(ge=1)]
    withdrawal_layer: Count | None
    interval: Annotated[list[Count], Field(min_length=2, max_length=2)] | None
    policy: str
    eta: Annotated[float, Field(gt=0)]
    positions: str
    min_layer: Count
    compromise: _Compromise | None = None
    tasks: Annotated[dict[str, _CalibratedTask], Field(min_length=1)]
    kl: _Curves
    agreement: _Agreement
    cost: _CalibrationCost
    schedule: dict[str, Any] | None
    samples: list[_CalibratedSample]

    @model_validator(mode="after")
    def _fits_together(self) -> _VtwCalibration:
        depth = self.num_layers
        curves = {"kl.mean": self.kl.mean, "agreement.mean": self.agreement.mean}
        for name, task in self.tasks.items():
            curves |= {f"tasks.{name}.kl": task.kl, f"tasks.{name}.agreement": task.agreement}
        curves |= {f"kl.samples.{i}": row for i, row in enumerate(self.kl.samples)}
        for name, curve in curves.items():
            if len(curve) != depth:
                raise ValueError(f"{name} has {len(curve)} entries, and num_layers is {depth}")
        if len(self.samples) != len(self.kl.samples):
            raise ValueError(f"{len(self.samples)} samples, but {len(self.kl.samples)} rows in kl.samples")
        if not any(sample.visual for sample in self.samples):
            raise ValueError("samples: none has a visual token")
        if (self.withdrawal_layer or 0) > depth:
            raise ValueError(f"withdrawal_layer is {self.withdrawal_layer}, and num_layers is {depth}")
        if self.withdrawal_layer is None and self.compromise is None:
            raise ValueError("compromise: required where withdrawal_layer is null")
        return self


class _OtherCalibration(_Part):
    format: Literal["vtw-calibration"]
    format_version: Literal[1] = 1
    method: str
    num_layers: Annotated[int, Field(ge=1)]
    schedule: dict[str, Any] | None
    samples: list[_Sample]


class _McNemar(_Part):
    p: float


class _Mean(_Part):
    mean: float


class _Compared(_Part):
    mean: float
    difference: float
    interval: Pair | None
    mcnemar: _McNemar | None


class _EvaluatedTask(_Part):
    metric: str
    judged: Count
    full: _Mean | None = None
    schedules: dict[str, _Compared] | None = None


class _Bytes(_Part):
    full_measured: float


class _EvaluationCost(_CalibrationCost):
    flops_ratio: dict[str, Share]
    flops_full: dict[str, float]
    kv_bytes: _Bytes

    @model_validator(mode="after")
    def _has_full_flops(self) -> _EvaluationCost:
        if self.convention not in self.flops_full:
            raise ValueError(f"flops_full has no entry for the convention {self.convention!r}")
        return self


class _EvaluatedSchedule(_Part):
    schedule: dict[str, Any]
    kl_first: float
    kl_answer: float
    top1_agreement: float
    exact_sequences: float
    first_divergence: float | None
    worst_task: str | None
    worst_difference: float | None
    cost: _EvaluationCost

    @model_validator(mode="after")
    def _fits_together(self) -> _EvaluatedSchedule:
        if "actions" not in self.schedule:
            raise ValueError("schedule has no actions")
        if (self.worst_task is None) != (self.worst_difference is None):
            raise ValueError("worst_task and worst_difference go together")
        return self


class _Gate(_Part):
    schedule: str
    gate: Literal["max_drop", "max_kl", "min_agreement", "max_flops"]
    task: str | None
    found: float | None
    allowed: float
    passed: bool


class _Time(_Part):
    median: Annotated[float, Field(gt=0)]
    iqr: Pair


class _TimePerToken(_Time):
    median: Annotated[float, Field(ge=0)]  # a difference of two times, which noise may eat up


class _Latency(_Part):
    ttft: _Time
    tpot: _TimePerToken


class _Memory(_Part):
    device: float | None = None
    resident: float | None = None


class _Measured(_Part):
    latency: dict[str, _Latency] | None = None
    memory: dict[str, _Memory | None] | None = None


class _Evaluation(_Part):
    format: Literal["vtw-evaluation"]
    format_version: Literal[1] = 1
    model: _Named
    tasks: dict[str, _EvaluatedTask]
    schedules: Annotated[dict[str, _EvaluatedSchedule], Field(min_length=1)]
    gates: list[_Gate]
    run: _Measured = Field(default_factory=_Measured)

    @model_validator(mode="after")
    def _fits_together(self) -> _Evaluation:
        for task, row in self.tasks.items():
            if row.schedules is None:  # no references
                continue
            if row.full is None or row.schedules.keys() != self.schedules.keys():
                raise ValueError(
                    f"tasks.{task}: not all of the schedules are in it, or the full model is not"
                )
        if self.run.latency:
            missing = {"full", *self.schedules} - self.run.latency.keys()
            if missing:
                raise ValueError(f"run.latency has no {min(missing)}")
        return self


def read_calibration(path: Path | None) -> dict[str, Any] | None:
    """The result document of ``vtw calibrate``; None without a path.

    Raises:
        UsageError: unreadable, or not such a document; names file and key.
    """
    if path is None:
        return None
    return _calibration(documents.read(path, "calibration result"), path)


def calibration_in(path: Path) -> dict[str, Any] | None:
    """The calibration result in a file that may as well hold a schedule; None if it does.

    Raises:
        UsageError: unreadable, or a calibration result that is not valid.
    """
    node = documents.read(path, "schedule")
    return _calibration(node, path) if isinstance(node, dict) and "format" in node else None


def read_evaluation(path: Path | None) -> dict[str, Any] | None:
    """The result document of ``vtw eval``; None without a path.

    Raises:
        UsageError: unreadable, or not such a document; names file and key.
    """
    if path is None:
        return None
    return _checked(documents.read(path, "evaluation result"), path, _Evaluation, "evaluation result")


def _calibration(node: Any, path: Path) -> dict[str, Any]:
    other = isinstance(node, dict) and node.get("method", "vtw") != "vtw"
    return _checked(node, path, _OtherCalibration if other else _VtwCalibration, "calibration result")


def _checked(node: Any, path: Path, model: type[BaseModel], kind: str) -> dict[str, Any]:
    documents.validate(node, model, str(path), kind)
    found: dict[str, Any] = documents.plain(node)
    from vtwcli.schedule.schedule import Schedule

    for name, schedule in _schedules(found):
        Schedule.from_dict(schedule, f"{path}: {name}")
    return found


def _schedules(document: dict[str, Any]) -> list[tuple[str, Any]]:
    if document["format"] == "vtw-evaluation":
        return [(f"schedules.{name}", row["schedule"]) for name, row in document["schedules"].items()]
    return [("schedule", document["schedule"])] if document["schedule"] is not None else []
