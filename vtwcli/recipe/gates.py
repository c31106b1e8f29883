"""Limits that an evaluation is held to."""

from __future__ import annotations

from pydantic import Field, model_validator

from vtwcli.io.section import Section


class GatesSection(Section):
    """What an evaluation must show; a gate that does not hold ends with exit code 3."""

    max_drop: float | None = Field(
        None, ge=0, description="fail if the worst task's metric drops by more; 0.01 is one answer in 100"
    )
    max_kl: float | None = Field(
        None, ge=0, description="fail if the mean KL over the answers' tokens, in nats, is larger"
    )
    min_agreement: float | None = Field(
        None, ge=0, le=1, description="fail if a smaller share of tokens stays the most likely one"
    )
    max_flops: float | None = Field(
        None, gt=0, description="fail if the prompt takes a larger share of the full model's arithmetic"
    )
    risk: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="largest mean share of an answer's tokens that change, in each task, on inputs like the samples: "
        "fails unless the samples prove it",
    )
    confidence: float | None = Field(
        None, gt=0, lt=1, description="of that proof, by default 0.95: one of 20 may be wrong"
    )

    @model_validator(mode="after")
    def _sure_of_what(self) -> GatesSection:
        if self.confidence is not None and self.risk is None:
            raise ValueError("confidence goes with risk")
        return self
