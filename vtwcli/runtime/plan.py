"""A schedule, asked layer by layer; what it may say is told in ``words``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from vtwcli.runtime.contract import PruningError
from vtwcli.schedule.rules import check_depth, earliest_starts, read
from vtwcli.schedule.words import ALL_ROWS, ScheduleError, row


@dataclass(frozen=True)
class PlannedAction:
    """One action of the schedule; ``at`` is None for ``auto``. Field names are those of the canonical form."""

    action: str
    at: int | None
    until: int | None = None
    after: int = -1
    when: Mapping[str, Any] = field(default_factory=dict, hash=False)
    select: Mapping[str, Any] = field(default_factory=dict, hash=False)
    sink: str = "renormalise"
    readers: str = "text"
    columns: str = "all"
    during: str = "all"
    every: int | None = None
    steps: int = 1
    both_ways: bool = False

    @classmethod
    def of(cls, action: Mapping[str, Any]) -> PlannedAction:
        """From the canonical form."""
        return cls(**{**action, "at": None if action["at"] == "auto" else action["at"]})

    @property
    def measured(self) -> bool:
        """Whether the selection needs attention numbers of the layer before."""
        return bool(self.select) and row("score", self.select["score"]).needs is not None

    @property
    def needs_all(self) -> bool:
        """Whether the selection needs the attention of all rows of the layer before."""
        return bool(self.select) and row("score", self.select["score"]).needs == ALL_ROWS

    def covers(self, layer: int) -> bool:
        """Whether a range action acts in ``layer``."""
        return self.at is not None and self.until is not None and self.at <= layer < self.until


class Plan:
    """A valid schedule, asked layer by layer.

    Raises:
        PruningError: an action that this runtime cannot execute on a model of this depth.
    """

    def __init__(self, schedule: Mapping[str, Any], depth: int, first_withdrawal: int) -> None:
        try:
            actions = read(schedule)
            check_depth(actions, depth, first_withdrawal)
        except ScheduleError as error:
            raise PruningError(str(error)) from None
        self.depth = depth
        self.key = json.dumps(schedule.get("actions", ()), sort_keys=True)
        planned = [PlannedAction.of(action) for action in actions]
        self.trims = [a for a in planned if a.every is not None and a.at is not None and a.at < depth]
        self.leaving = [a for a in planned if a.action in ("withdraw", "keep") and a.every is None]
        self.mutes = [a for a in planned if a.action == "mute"]
        self.freezes = [a for a in planned if a.action == "freeze"]
        for i, start in enumerate(earliest_starts(actions)):
            if self.leaving[i].at is None:  # nothing is looked at before the action above has started
                self.leaving[i] = replace(self.leaving[i], after=start - 2)
        for number, a in enumerate(planned, 1):
            if a.at == 0 and a.measured:
                raise PruningError(
                    f"action {number} ({a.action}): score {a.select['score']} comes from the layer before; "
                    "start at 1 or later"
                )
        for trim in self.trims:
            first = (trim.at or 0) - 1
            if any(self.mutes_in(layer) for layer in range(first, depth)):
                raise PruningError(f"layers from {first} on must not be muted where 'every' looks at them")
        for layer in range(depth):
            if self.needs_all(layer) and (self.mutes_in(layer) or self.frozen(layer)):
                raise PruningError(
                    f"layer {layer} is muted or frozen, so it has no scores of all rows; let 'keep' start two layers "
                    "after that ends"
                )
            if self.may_probe(layer) and any(a.covers(layer) and a.readers != "visual" for a in self.mutes):
                raise PruningError(
                    f"layer {layer} is muted, so it has no scores or conditions; let 'keep' start two layers "
                    "after the mute ends, and 'auto' look after it ('after': its 'until' or later)"
                )

    def may_probe(self, layer: int) -> bool:
        """Whether the last row's attention in ``layer`` may be asked for."""
        if layer + 1 >= self.depth:
            return False
        return any(
            (a.at == layer + 1 and a.measured) or (a.at is None and layer > a.after) for a in self.leaving
        )

    def needs_all(self, layer: int) -> bool:
        """Whether the attention of all rows in ``layer`` is asked for."""
        return layer + 1 < self.depth and any(a.at == layer + 1 and a.needs_all for a in self.leaving)

    def trimmed(self, layer: int) -> bool:
        """Whether ``layer`` forgets tokens during the answer, or is looked at for that."""
        return any(layer >= (a.at or 0) - 1 for a in self.trims)

    def trims_at(self, layer: int, step: int, tokens: int) -> list[PlannedAction]:
        """What takes tokens away from ``layer`` on, in a pass of so many ``tokens``, the last of which is the
        ``step``-th behind the prompt."""
        return [
            a
            for a in self.trims
            if a.at == layer and a.every and step // a.every > (step - tokens) // a.every
        ]

    def sinks(self, layer: int, prefill: bool) -> list[PlannedAction]:
        """Mutes in ``layer`` that act on values, after the softmax."""
        return [a for a in self._mutes(layer, prefill) if a.sink != "renormalise"]

    def masks(self, layer: int, prefill: bool) -> list[PlannedAction]:
        """Mutes in ``layer`` that act before the softmax."""
        return [a for a in self._mutes(layer, prefill) if a.sink == "renormalise"]

    def _mutes(self, layer: int, prefill: bool) -> list[PlannedAction]:
        """Mutes in ``layer``, in a forward pass with visual tokens of its own (``prefill``) or behind it."""
        return [a for a in self.mutes if a.covers(layer) and (prefill or a.during == "all")]

    def muted_as(self, layer: int) -> tuple[PlannedAction, ...]:
        """Mutes in ``layer``, in order, without their layers: equal where they do the same."""
        return tuple(replace(a, at=None, until=None) for a in self.mutes if a.covers(layer))

    def mutes_in(self, layer: int) -> bool:
        """Whether anything is muted in ``layer``."""
        return any(a.covers(layer) for a in self.mutes)

    def text_skips(self, layer: int, prefill: bool) -> bool:
        """Whether text rows do not even need the visual columns of ``layer``."""
        return any(a.readers != "visual" and a.columns == "all" for a in self.masks(layer, prefill))

    def acts(self, layer: int) -> bool:
        """Whether ``layer`` does more in a prompt than run fewer rows, or must know its entries later."""
        return self.mutes_in(layer) or self.frozen(layer) or self.trimmed(layer)

    def frozen(self, layer: int) -> bool:
        """Whether visual rows are not updated in ``layer``."""
        return any(a.covers(layer) for a in self.freezes)

    @property
    def looks_around(self) -> bool:
        """Whether places of visual tokens are asked for."""
        return any(a.columns == "beyond" for a in self.mutes)

    @property
    def idle(self) -> bool:
        """Whether nothing ever happens in a model of this depth."""
        return (
            all(a.at is not None and a.at >= self.depth for a in [*self.leaving, *self.mutes, *self.freezes])
            and not self.trims
        )
