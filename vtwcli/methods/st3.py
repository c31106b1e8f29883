"""ST3: ever fewer visual tokens by layer, and ever fewer as the answer grows (arXiv 2412.20105).

No public code was found, and of the paper no more than its abstract was at hand: inattentive visual tokens leave as
layers deepen (progressive pruning), and the number of visual tokens in each layer falls as the generated tokens grow
(annealing). What is here is that idea and nothing to reproduce the paper's numbers by; guessed are all of these:

- Progressive pruning: in stages, the first at the third layer as FastV's, the same share of those left each time, by
  the attention of the prompt's last row in the layer before, mean over heads; positions stay.
- Annealing: behind each so many tokens of the answer the layers from the first stage on forget a share of the visual
  tokens that they hold, by the attention of the newest token in the layer before that stage.

The defaults leave about a third of the cache of a prompt that is all vision, which is what the abstract claims.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from vtwcli.methods.method import Candidate, Grid, Method, Shape, Style, fit_share
from vtwcli.methods.published import Layers, layer_of
from vtwcli.schedule.schedule import Keep, Schedule, Select

STAGES = (2, 5, 8, 11, 14, 17, 20, 23, 26, 29)


class ST3(Method):
    """Keep by attention at several layers, and again while the answer grows."""

    key: ClassVar[str] = "st3"
    title: ClassVar[str] = "ST3"
    paper: ClassVar[str | None] = "2412.20105"
    style: ClassVar[Style] = Style("#D55E00", "X", "ST3, after its abstract")

    layers: Layers = Field(STAGES, description="layers from which on fewer tokens exist; scaled to the depth")
    ratio: float = Field(0.75, gt=0, le=1, description="share of those left that stays at each, rounded up")
    every: int = Field(
        8, ge=0, description="tokens of the answer behind which the cache is trimmed; 0: never"
    )
    trim: float = Field(0.8, gt=0, le=1, description="share of those held that stays each time, rounded up")

    def fitted(self, model: Shape) -> ST3:
        if "layers" in self.model_fields_set:
            return self
        first = max(model.first_withdrawal, 1)
        layers = {max(layer_of(layer, model.depth), first) for layer in STAGES}
        fit = sorted(layer for layer in layers if layer < model.depth)
        return self.model_copy(update={"layers": tuple(fit)})

    def schedule(self, **provenance: Any) -> Schedule:
        layers, select = sorted(self.layers), Select(score="attention", ratio=self.ratio)
        actions = [Keep(at=layer, action="keep", select=select) for layer in layers]
        if self.every and layers:
            held = Select(score="attention", ratio=self.trim)
            actions.insert(1, Keep(at=layers[0], action="keep", every=self.every, select=held))
        return Schedule(actions=tuple(actions), provenance={"method": "st3", **provenance})

    @classmethod
    def compared(cls, model: Shape, grid: Grid, base: Mapping[str, Any]) -> list[Candidate]:
        """Three shares at each stage."""
        made = []
        for ratio in (0.9, 0.75, 0.5):
            one = cls(ratio=ratio).fitted(model)
            varied = {"layers": list(one.layers), "ratio": ratio}
            made.append(Candidate(f"st3 {ratio:.0%}", "st3", one.schedule(), varied))
        return made

    @classmethod
    def at_share(cls, model: Shape, share: float) -> ST3 | None:
        """The published stages with the ratio that the share takes; what leaves during the answer is not counted."""
        return fit_share(lambda ratio: cls(ratio=ratio).fitted(model), model, share)
