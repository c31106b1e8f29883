"""How a schedule is judged."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from vtwcli.recipe.fields import BATCH_SIZE, LONGEST, Answering, Limit, SkipBad


class EvalSection(Answering):
    """How a schedule is judged."""

    limit: Limit = 50
    max_new_tokens: int | None = Field(None, ge=1, description=LONGEST.format(48))
    batch_size: int | None = Field(None, ge=1, description=BATCH_SIZE)
    bootstrap: int = Field(
        1000,
        ge=0,
        description="how often samples are redrawn for the 95 % intervals of differences; 0 for none",
    )
    seed: int = Field(
        0, ge=0, description="which samples are drawn, and redrawn; the same seed gives the same result"
    )
    skip_bad: SkipBad = False
    timing: bool = Field(
        True, description="measure the time to the first token and per token, full and pruned in turn"
    )
    repeats: int = Field(
        9,
        ge=1,
        description="how often everything is timed; with 6 and more it can be told whether a speed-up is real",
    )
    timing_tokens: int = Field(8, ge=1, description="tokens generated to time decoding")
    timing_batch: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (1,), min_length=1, description="how many samples at once, to measure tokens a second"
    )
    baseline: str | None = Field(
        None,
        description="full model to compare with; by default the model itself, of ONNX graphs their base model",
    )
    backend: Literal["auto", "torch", "onnx", "openvino"] = Field(
        "auto",
        description="what runs it: torch, or for a directory of ONNX graphs onnx (ONNX Runtime) or openvino",
    )
    resume: bool = Field(
        False, description="go on with the samples that were finished before an interruption"
    )

    @field_validator("timing_batch", mode="before")
    @classmethod
    def _split_sizes(cls, value: Any) -> Any:
        return tuple(value.split(",")) if isinstance(value, str) else value
