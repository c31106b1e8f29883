"""A schedule, asked layer by layer; what it may say is told in ``words``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from vtwcli.runtime.contract import PruningError
from vtwcli.schedule.rules import check_depth, earliest_starts, in_front, parameters, read
from vtwcli.schedule.words import (
    ALL_ROWS,
    GUIDE,
    HIDDEN,
    KEYED,
    LAST_ROW,
    TOWER,
    ScheduleError,
    is_fixed,
    row,
    version_of,
)


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
    positions: str = "original"
    rest: Mapping[str, Any] = field(default_factory=dict, hash=False)
    every: int | None = None
    steps: int = 1
    both_ways: bool = False

    @classmethod
    def of(cls, action: Mapping[str, Any]) -> PlannedAction:
        """From the canonical form."""
        return cls(**{**action, "at": None if action["at"] == "auto" else action["at"]})

    @property
    def measured(self) -> bool:
        """Whether the selection needs numbers that a layer gives."""
        return self.needs not in (None, TOWER, GUIDE)

    @property
    def here(self) -> bool:
        """Whether they are those of its own layer."""
        return self.measured and self.select["layer"] == "here"

    @property
    def needs(self) -> str | None:
        """What the score is made of, see ``words.Word``."""
        return row("score", self.select["score"]).needs if self.select else None

    @property
    def before(self) -> bool:
        """Whether the attention of the layer before gives them."""
        return self.needs in (LAST_ROW, KEYED, ALL_ROWS) and not self.here

    @property
    def asks(self) -> bool:
        """Whether they are more than the last row's, and chosen by ``rows``, ``heads`` or ``level``."""
        if not self.before or self.needs != LAST_ROW:
            return False
        return self.select["rows"] != "last" or "heads" in self.select or self.select["level"]

    @property
    def asks_visual(self) -> bool:
        """Whether they are those of visual rows, among others."""
        return self.measured and self.select["rows"] in ("visual", "all")

    @property
    def needs_all(self) -> bool:
        """Whether the selection needs the attention of all rows of the layer before."""
        return self.needs == ALL_ROWS

    def covers(self, layer: int) -> bool:
        """Whether a range action acts in ``layer``."""
        return self.at is not None and self.until is not None and self.at <= layer < self.until


class Plan:
    """A valid schedule, asked layer by layer.

    Attributes:
        newer: whether an action, but for its condition, says what the first version of the form cannot.

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
        said = [{key: value for key, value in action.items() if key != "when"} for action in actions]
        self.newer = version_of(said) > 1
        self.fixed = is_fixed(actions)
        self.key = json.dumps(schedule.get("actions", ()), sort_keys=True)
        planned = [PlannedAction.of(action) for action in actions]
        self.trims = [a for a in planned if a.every is not None and a.at is not None and a.at < depth]
        self.leaving = [a for a in planned if a.action in ("withdraw", "keep") and a.every is None]
        self.front = next((a.select for a in self.leaving if a.select and in_front(vars(a))), None)
        """The selection that takes tokens away before the first layer, from the vision tower."""
        self.front_parameters = {} if self.front is None else parameters(self.front)
        self.mutes = [a for a in planned if a.action == "mute"]
        self.freezes = [a for a in planned if a.action == "freeze"]
        for i, start in enumerate(earliest_starts(actions)):
            if self.leaving[i].at is None:  # nothing is looked at before the action above has started
                self.leaving[i] = replace(self.leaving[i], after=start - 2)
        for number, a in enumerate(planned, 1):
            if a.at == 0 and a.measured and not a.here:
                raise PruningError(
                    f"action {number} ({a.action}): score {a.select['score']} comes from the layer before; "
                    "start at 1 or later"
                )
        starts = [a.at for a in self.leaving]
        for number, a in enumerate(planned, 1):
            if a.rest and starts.count(a.at) > 1:
                raise PruningError(
                    f"action {number} ({a.action}): 'rest' needs a layer of its own, not {a.at}"
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
            looks = self.may_probe(layer) or self.looks_in(layer)
            mutes = [a for a in self.mutes if a.covers(layer)]
            wide = [a for a in (self.asks_in(layer) | self.looks_in(layer)).values() if a.asks_visual]
            if wide and (any(a.readers != "text" for a in mutes) or self.frozen(layer)):
                raise PruningError(
                    f"layer {layer} is frozen or muted, so its visual rows have no scores to give; use rows: text"
                )
            if looks and any(a.readers != "visual" for a in mutes):
                raise PruningError(
                    f"layer {layer} is muted, so it has no scores or conditions; let 'keep' start two layers "
                    "after the mute ends, and 'auto' look after it ('after': its 'until' or later)"
                )

    def may_probe(self, layer: int) -> bool:
        """Whether the last row's attention in ``layer`` may be asked for."""
        if layer + 1 >= self.depth:
            return False
        return any(
            (a.at == layer + 1 and a.before) or (a.at is None and layer > a.after) for a in self.leaving
        )

    def looks_in(self, layer: int) -> dict[int, PlannedAction]:
        """The actions, by number, that ask ``layer`` itself before it runs."""
        return {i: a for i, a in enumerate(self.leaving) if a.at == layer and a.here}

    def asks_last(self, layer: int) -> bool:
        """Whether something behind ``layer`` may ask its last row."""
        return any(
            (a.at == layer + 1 and a.before and a.needs in (LAST_ROW, ALL_ROWS) and not a.asks)
            or (a.at is None and layer > a.after)
            for a in self.leaving
        )

    def by_states(self, layer: int) -> dict[int, PlannedAction]:
        """The actions, by number, that start in ``layer`` and look at the rows that enter it."""
        return {i: a for i, a in enumerate(self.leaving) if a.at == layer and a.needs in (HIDDEN, KEYED)}

    @property
    def guided(self) -> list[int]:
        """The numbers of the actions whose scores come from outside."""
        return [i for i, a in enumerate(self.leaving) if a.needs == GUIDE]

    def asks_in(self, layer: int) -> dict[int, PlannedAction]:
        """The actions, by number, that ask other rows of ``layer`` than the last."""
        return {i: a for i, a in enumerate(self.leaving) if a.at == layer + 1 and a.asks}

    def merges(self, layer: int) -> bool:
        """Whether rows are merged at the entry of ``layer``."""
        return any(a.at == layer and a.rest for a in self.leaving)

    @property
    def rates(self) -> bool:
        """Whether raters are asked."""
        return any(a.measured and a.select["rows"] == "raters" for a in self.leaving)

    @property
    def renumbers(self) -> bool:
        """Whether positions change."""
        return any(a.positions == "compact" for a in self.leaving)

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
