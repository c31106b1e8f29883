"""Limits that an evaluation is held to."""

from __future__ import annotations

from pydantic import Field, model_validator

from vtwcli.io.section import Section


class GatesSection(Section):
    """What an evaluation must show; a gate that does not hold ends with exit code 3."""

    max_drop: float | None = Field(None, ge=0, description="largest drop of the worst task's metric")
    max_kl: float | None = Field(None, ge=0, description="largest mean KL over answer positions")
    min_agreement: float | None = Field(
        None, ge=0, le=1, description="least share of tokens whose first choice stays"
    )
    max_flops: float | None = Field(None, gt=0, description="largest share of the full prefill FLOPs")
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
