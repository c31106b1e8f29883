"""YOPO: visual tokens read their neighbours only, and late layers do without them (arXiv 2410.06169).

Of the published method's four parts two need no other weights, and these are here:

- In all layers a visual row reads, of the visual tokens, those of its own image that are at most (w - 1) / 2 rows and
  columns away. The published code lays a mask of its own over the causal one, so that a visual row also reads the
  neighbours behind it (``both_ways``); a model that was not trained so has never done that.
- From one layer on text does not read vision. The published code sets these weights to zero behind the softmax and goes
  on with all rows, a simulation that saves nothing (``late: zero``); by default the tokens leave, as in the paper.

Pruned heads and the sparse feed-forward of visual rows stay out: which heads are inactive is measured on training data
and shipped as a file for one model, and the halved feed-forward changes the weights; both were fine-tuned. The script
that is published (13B) has w = 5 and the first 20 of 40 layers with vision; other depths take half of theirs.

The neighbourhood saves nothing by itself, since attention computes whole rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from vtwcli.methods.method import Candidate, Grid, Method, Shape, Style
from vtwcli.methods.published import layer_of
from vtwcli.schedule.schedule import Action, Mute, Schedule, Withdraw

_LAYERS = 40  # of the published model


class YOPO(Method):
    """Mute visual rows' reading beyond their neighbours, and withdraw late."""

    key: ClassVar[str] = "yopo"
    title: ClassVar[str] = "YOPO"
    paper: ClassVar[str | None] = "2410.06169"
    style: ClassVar[Style] = Style("#0072B2", "d", "YOPO, untrained")

    window: int = Field(5, ge=1, description="w: side of the square of neighbours that a visual token reads")
    layer: int = Field(20, ge=0, description="first layer without vision; by default half of the depth")
    both_ways: bool = Field(
        True, description="neighbours that come later are read too, as in the published code"
    )
    late: Literal["withdraw", "zero"] = Field(
        "withdraw", description="withdraw, or zero as the published code"
    )
    depth: int = Field(
        _LAYERS, ge=1, description="layers of the model; by default those of the model at hand"
    )

    def fitted(self, model: Shape) -> YOPO:
        given = self.model_dump(include=self.model_fields_set)
        layer = max(layer_of(20, model.depth, _LAYERS), model.first_withdrawal)
        return YOPO(**{"depth": model.depth, "layer": layer, **given})

    def schedule(self, **provenance: Any) -> Schedule:
        until = self.depth if self.late == "zero" else min(self.layer, self.depth)
        actions: list[Action] = []
        if until:
            steps = (self.window - 1) // 2
            near: dict[str, Any] = {"columns": "beyond", "steps": steps, "both_ways": self.both_ways}
            actions.append(Mute(at=0, until=until, action="mute", readers="visual", **near))
        if self.late == "withdraw":
            actions.append(Withdraw(at=self.layer, action="withdraw"))
        elif self.layer < self.depth:
            actions.append(Mute(at=self.layer, until=self.depth, action="mute", readers="all", sink="zero"))
        return Schedule(actions=tuple(actions), provenance={"method": "yopo", **provenance})

    @classmethod
    def compared(cls, model: Shape, grid: Grid, base: Mapping[str, Any]) -> list[Candidate]:
        """The published numbers, with neighbours in both directions and in one."""
        made = []
        for both_ways in (True, False):
            one = cls(both_ways=both_ways).fitted(model)
            varied = {"window": one.window, "layer": one.layer, "both_ways": both_ways}
            name = f"yopo K={one.layer} {'both ways' if both_ways else 'causal'}"
            made.append(Candidate(name, "yopo", one.schedule(), varied))
        return made
