"""VTC-CLS: what the vision tower's class token attends to, over several layers (arXiv 2412.05819).

Of each image stay the tokens with the largest sum over vision layers of the class token's attention, mean over heads;
the last layer is left out, as in the published code. Its scripts take the first layer of the sum from the command
line and give none: here it is the ninth from the end (layer 15 of 24), scaled to the
tower's depth. With ``first=-2`` this is FasterVLM.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

from pydantic import Field

from vtwcli.methods.in_front import InFront
from vtwcli.methods.method import Shape, Style


class VtcCls(InFront):
    """Keep what the class token attends to over the last layers; 64 of 576 tokens by default."""

    key: ClassVar[str] = "vtc_cls"
    title: ClassVar[str] = "VTC-CLS"
    paper: ClassVar[str | None] = "2412.05819"
    style: ClassVar[Style] = Style("#56B4E9", "s", "VTC-CLS")
    score: ClassVar[str] = "tower_cls"
    class_token: ClassVar[bool] = True

    first: int = Field(-9, le=-2, description="first vision layer of the sum, counted from the end below 0")

    def fitted(self, model: Shape) -> Self:
        """The first layer scaled to the tower's depth, where it was not given."""
        if "first" in self.model_fields_set or model.tower_depth is None:
            return self
        first = min(-2, -round(9 * model.tower_depth / 24))
        return self.model_copy(update={"first": first})

    def parameters(self) -> dict[str, Any]:
        return {"first": self.first} if self.first != -2 else {}
