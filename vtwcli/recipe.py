"""What a user may ask for: every option with its type, its check and its one default."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from vtwcli.documents import nearest
from vtwcli.errors import UsageError


class Section(BaseModel):
    """Base of all parts of a recipe: unknown keys are errors and values never change."""

    # schemas are built on first use: help pages read the fields only
    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)


class Columns(Section):
    """Names of a data source's columns; None means the usual names, or the task row's own."""

    image: str | None = Field(
        default=None, description="image: a path, bytes or an image; by default image or file_name"
    )
    question: str | None = Field(default=None, description="question text; by default question")
    answer: str | None = Field(
        default=None, description="accepted answer or answers; by default answer or answers"
    )
    choices: str | None = Field(default=None, description="list of options; by default choices, if present")
    task: str | None = Field(default=None, description="task name of each row; by default task, if present")


class DataSpec(Section):
    """One data source of the mix and how to read it.

    ``source`` is ``demo``, a built-in task (``scienceqa``, ``gqa``, ...), a local directory or file, or the
    name of a data set on the Hub, in this order; write ``./demo`` for a directory of that name.
    """

    source: str = Field(description="demo, a built-in task, a local path or a Hub data set")
    task: str | None = Field(
        default=None, description="name of the task in the mix; by default the source's own"
    )
    tasks: tuple[str, ...] | None = Field(default=None, description="take only these tasks of the source")
    split: str | None = Field(default=None, description="split to read")
    config: str | None = Field(default=None, description="configuration of a Hub data set")
    revision: str | None = Field(default=None, description="branch, tag or commit of a Hub data set")
    path: str | None = Field(default=None, description="local copy of a built-in task's data set")
    limit: int | None = Field(default=None, ge=1, description="samples per task")
    order: Literal["shuffle", "first"] = Field(
        default="shuffle",
        description="shuffle: a seeded draw; first: the first rows, as published searches do",
    )
    prompt: str | None = Field(default=None, description="template with {question}, {choices} or any column")
    metric: str | None = Field(default=None, description="metric that judges the answers")
    columns: Columns = Columns()

    @field_validator("source")
    @classmethod
    def _has_source(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("a data source needs a name or a path")
        return value

    @field_validator("tasks", mode="before")
    @classmethod
    def _split_tasks(cls, value: Any) -> Any:
        return tuple(value.split("+")) if isinstance(value, str) else value

    @classmethod
    def parse(cls, text: str) -> DataSpec:
        """Read the command line's form ``SOURCE[:key=value,...]``.

        Keys are this class's fields and ``columns.NAME``; ``tasks`` takes names joined by ``+``; ``\\n`` in a
        prompt is a line break. A comma begins a new key only if ``key=`` follows it, so that prompts may hold
        commas. Text that is an existing path is a path, whatever characters it holds.

        Raises:
            UsageError: unknown or repeated keys, values of the wrong type, or no source.
        """
        source, options = text, ""
        if not _is_path(text):
            match = re.match(r"(.+?):(?=[\w.]+=)(.*)$", text, flags=re.DOTALL)
            if match:
                source, options = match.groups()
            elif ":" in text:
                rest = text.split(":", 1)[1]
                raise UsageError(
                    f"data source {text!r}: {rest!r} is not KEY=VALUE", f"known keys: {_KEYS_TEXT}"
                )
        values: dict[str, Any] = {"source": source}
        columns: dict[str, str] = {}
        for item in re.split(r",(?=[\w.]+=)", options) if options else ():
            key, value = item.split("=", 1)
            if key not in _KEYS:
                close = nearest(key, _KEYS)
                hint = f"did you mean {close!r}?" if close else f"known keys: {_KEYS_TEXT}"
                raise UsageError(f"data source {text!r}: unknown key {key!r}", hint)
            target, name = (columns, key[len("columns.") :]) if key.startswith("columns.") else (values, key)
            if name in target:
                raise UsageError(f"data source {text!r}: key {key!r} is given twice")
            target[name] = value.replace("\\n", "\n") if key == "prompt" else value
        try:
            return cls(**values, columns=Columns(**columns))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            reason = first["msg"].removeprefix("Value error, ")
            raise UsageError(f"data source {text!r}: {where}: {reason}") from None


def _is_path(text: str) -> bool:
    try:
        return Path(text).exists()
    except OSError:  # a prompt can be longer than a file name may be
        return False


_KEYS = tuple(
    [name for name in DataSpec.model_fields if name not in ("source", "columns")]
    + [f"columns.{name}" for name in Columns.model_fields]
)
_KEYS_TEXT = ", ".join(_KEYS)


class ModelSection(Section):
    """Which model, where it runs and in which precision."""

    name: str = Field("demo", description="local directory, Hub id with optional @revision, or demo")
    device: str = Field(
        "auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$", description="auto, cpu, cuda, cuda:N or mps"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto, float32, bfloat16 or float16"
    )
    attn: Literal["sdpa", "eager", "flash_attention_2"] | None = Field(
        None, description="attention implementation: sdpa, eager or flash_attention_2"
    )
    trust_remote_code: bool = Field(False, description="run code that comes with the model")
    stream: bool | None = Field(
        None, description="read one layer at a time from disk; by default only when the model does not fit"
    )


Policy = Literal["paper", "sustained", "quantile", "agreement", "worst-task", "budget"]


class CalibrateSection(Section):
    """How K is found."""

    limit: int = Field(20, ge=1, description="samples per task")
    eta: float = Field(0.003, gt=0, description="KL threshold in nats")
    min_layer: int | None = Field(
        None, ge=0, description="first candidate layer; by default 5 for 16 layers and more, else 1"
    )
    policy: Policy = Field(
        "worst-task", description="paper, sustained, quantile, agreement, worst-task or budget"
    )
    positions: Literal["first", "answer"] = Field(
        "answer", description="first: the next token after the prompt; answer: every token of the answer"
    )
    answers: Literal["auto", "generated", "reference"] = Field(
        "auto",
        description="whose answer is teacher-forced: the full model's own greedy one, or the reference; "
        "auto is generated, and reference when layers are streamed",
    )
    max_new_tokens: int = Field(48, ge=1, description="longest generated answer")
    quantile: float = Field(0.95, gt=0, le=1, description="of the samples' KL, for the policy quantile")
    agreement: float = Field(0.98, gt=0, le=1, description="least top-1 agreement, for the policy agreement")
    budget: float = Field(
        0.6, gt=0, le=1, description="largest share of the full cost, for the policy budget"
    )
    budget_of: Literal["flops", "kv"] = Field("flops", description="what the budget counts: flops or kv")
    bootstrap: int = Field(1000, ge=0, description="resamples for the interval of K; 0 for none")
    seed: int = Field(0, ge=0, description="of sample choice and bootstrap")
    skip_bad: bool = Field(False, description="skip unreadable samples and count them")
    resume: bool = Field(False, description="keep finished samples across an interruption")


class EvalSection(Section):
    """How a schedule is judged."""

    limit: int = Field(50, ge=1, description="samples per task")
    max_new_tokens: int = Field(48, ge=1, description="longest answer")
    batch_size: int = Field(8, ge=1, description="samples generated at once")
    bootstrap: int = Field(1000, ge=0, description="resamples for the intervals of differences; 0 for none")
    seed: int = Field(0, ge=0, description="of sample choice and bootstrap")
    skip_bad: bool = Field(False, description="skip unreadable samples and count them")
    timing: bool = Field(True, description="measure latencies, full and pruned in turn")
    repeats: int = Field(5, ge=1, description="counted timing runs of each variant")
    timing_tokens: int = Field(8, ge=1, description="tokens generated to time decoding")
    max_drop: float | None = Field(None, ge=0, description="gate: largest drop of the worst task's metric")
    max_kl: float | None = Field(None, ge=0, description="gate: largest mean KL over answer positions")


class ExportSection(Section):
    """What an exported directory holds."""

    format: Literal["hf", "onnx"] = Field(
        "hf", description="hf, a Hugging Face directory, or onnx, split graphs"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16", "fp32", "fp16"] = Field(
        "auto",
        description="auto keeps the weights as they are (onnx: float32); else float32, bfloat16 or float16",
    )
    opset: int = Field(20, ge=18, le=24, description="of the ONNX graphs, 18 to 24")
    merged: bool = Field(False, description="one ONNX decoder with the removal inside, instead of two")
    quantize: Literal["int8", "int4"] | None = Field(
        None, description="int8 or int4 weights of the ONNX decoder"
    )


class Recipe(Section):
    """One file from model to verified artefact; every part has a default.

    A list under ``data`` holds data sources, each a mapping or the command line's short form.
    """

    model: ModelSection = ModelSection()
    data: tuple[DataSpec, ...] = ()
    calibrate: CalibrateSection = CalibrateSection()
    eval: EvalSection = EvalSection()
    export: ExportSection = ExportSection()

    @field_validator("model", mode="before")
    @classmethod
    def _short_model(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("data", mode="before")
    @classmethod
    def _short_data(cls, value: Any) -> Any:
        if not isinstance(value, list | tuple):
            return value
        try:
            return [DataSpec.parse(one) if isinstance(one, str) else one for one in value]
        except UsageError as error:
            raise ValueError(str(error)) from None

    def relative_to(self, folder: Path) -> Recipe:
        """The same recipe with paths that exist beside its file made relative to the working directory."""

        def resolved(text: str) -> str:
            inside = folder / text
            return str(inside) if not Path(text).is_absolute() and inside.exists() else text

        data = tuple(spec.model_copy(update={"source": resolved(spec.source)}) for spec in self.data)
        model = self.model.model_copy(update={"name": resolved(self.model.name)})
        return self.model_copy(update={"model": model, "data": data})
