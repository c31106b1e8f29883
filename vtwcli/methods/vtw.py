"""VTW: every visual token leaves at one layer (arXiv 2405.05803)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from vtwcli.methods.method import Candidate, Grid, Method, Shape, Style
from vtwcli.schedule.intervention import Intervention
from vtwcli.schedule.schedule import Schedule


class Vtw(Method):
    """Withdraw all visual tokens at one layer; ``vtw calibrate`` finds it."""

    key: ClassVar[str] = "vtw"
    title: ClassVar[str] = "VTW"
    paper: ClassVar[str | None] = "2405.05803"
    finds: ClassVar[str | None] = "the withdrawal layer"
    style: ClassVar[Style] = Style("#0072B2", "o", "VTW: withdrawal at K")

    layer: int = Field(ge=0, description="withdraw at this layer")

    def schedule(self, **provenance: Any) -> Schedule:
        return Schedule.withdraw_at(self.layer, **provenance)

    def label(self) -> str:
        return f"K={self.layer}"

    @classmethod
    def compared(cls, model: Shape, grid: Grid, base: Mapping[str, Any]) -> list[Candidate]:
        layers = range(model.first_withdrawal, model.depth)
        return [Candidate(f"K={k}", "vtw", Schedule.withdraw_at(k), {"layer": k}) for k in layers]

    @classmethod
    def ask(cls, model: Shape) -> list[Intervention]:
        return [Intervention("withdraw", k) for k in range(model.depth)]

    @classmethod
    def at_share(cls, model: Shape, share: float) -> Vtw | None:
        """Withdrawal at the last layer that keeps within the share."""
        k = int(share * model.depth + 1e-9)
        return cls(layer=k) if max(model.first_withdrawal, 1) <= k < model.depth else None
