"""One hypothetical action, which the sweep answers beside many others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vtwcli.errors import UsageError

KINDS = ("withdraw", "mute", "freeze")


@dataclass(frozen=True)
class Intervention:
    """One hypothetical change to what visual tokens do, from layer ``start`` on.

    Attributes:
        kind: ``withdraw``: from ``start`` on there are no visual tokens. ``mute``: in layers start..stop-1 text
            rows do not read visual columns, the softmax runs over the rest. ``freeze``: in layers start..stop-1
            the layer's update of visual rows is dropped; they still serve as keys and values.
        start: first layer concerned, 0-based; L means no change at all.
        stop: first layer no longer concerned; None means to the end. ``withdraw`` has none.

    Raises:
        UsageError: an unknown kind, or no range of layers.
    """

    kind: Literal["withdraw", "mute", "freeze"]
    start: int
    stop: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError(f"unknown intervention {self.kind!r}", f"one of {', '.join(KINDS)}")
        if self.start < 0 or (self.stop is not None and self.stop <= self.start):
            raise UsageError(f"{self.kind} from layer {self.start} to {self.stop} is no range of layers")
        if self.kind == "withdraw" and self.stop is not None:
            raise UsageError("withdrawn visual tokens do not come back", "leave out stop, or use mute")

    def active(self, layer: int) -> bool:
        """Whether the change concerns ``layer``."""
        return self.start <= layer and (self.stop is None or layer < self.stop)
