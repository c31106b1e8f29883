"""An exit without training, after DyVTE (arXiv 2411.19628): visual tokens leave once the last row reads them no more.

DyVTE asks a trained gate behind each layer whether visual tokens may go. This asks the attention instead: how much of
the last row's goes to the visual tokens that are there, mean over heads. Once it was below a threshold in so many
layers, all visual tokens leave at the next. Every sample has its own layer. No threshold is published;
``vtw calibrate --method exit`` finds threshold and number of layers on your samples, and the default is no more than a
place to start from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from vtwcli.methods.method import Answers, Candidate, Grid, Method, Shape, Style
from vtwcli.schedule.schedule import Schedule, When, Withdraw

THRESHOLDS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
LAYERS = (1, 2, 4)


class Exit(Method):
    """Withdraw at ``auto``, when the last row's attention to vision is low."""

    key: ClassVar[str] = "exit"
    title: ClassVar[str] = "exit by attention"
    finds: ClassVar[str | None] = "its threshold and its number of layers"
    searched: ClassVar[tuple[str, ...]] = ("threshold", "exit_layers")
    style: ClassVar[Style] = Style("#E69F00", "h", "exit by attention, after DyVTE")

    threshold: float = Field(
        0.1, ge=0, le=1, description="share of attention below which vision is read no more"
    )
    exit_layers: int = Field(2, ge=1, description="how many layers must be below until all tokens leave")
    consecutive: bool = Field(False, description="they must follow one another")
    after: int | None = Field(
        None, ge=0, description="looked for behind this layer; by default from the first on"
    )

    def fitted(self, model: Shape) -> Exit:
        if "after" in self.model_fields_set or model.first_withdrawal < 2:
            return self
        return self.model_copy(update={"after": model.first_withdrawal - 2})

    def schedule(self, **provenance: Any) -> Schedule:
        when = When(attention_below=self.threshold, layers=self.exit_layers, consecutive=self.consecutive)
        action = Withdraw(at="auto", after=self.after, action="withdraw", when=when)
        return Schedule(actions=(action,), provenance={"method": "exit", **provenance})

    @classmethod
    def compared(cls, model: Shape, grid: Grid, base: Mapping[str, Any]) -> list[Candidate]:
        """Every threshold, with the default number of layers."""
        return [cls(threshold=threshold)._candidate(model) for threshold in THRESHOLDS]

    @classmethod
    def candidates(cls, model: Shape, found: Answers, base: Mapping[str, Any]) -> list[Candidate]:
        """Every threshold with every number of layers."""
        return [cls(threshold=t, exit_layers=m)._candidate(model) for t in THRESHOLDS for m in LAYERS]

    def _candidate(self, model: Shape) -> Candidate:
        varied = {"threshold": self.threshold, "exit_layers": self.exit_layers}
        name = f"exit a={self.threshold:g} m={self.exit_layers}"
        return Candidate(name, "exit", self.fitted(model).schedule(), varied)
