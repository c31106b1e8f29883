"""What schedules can have done to one sample by some layer: which rows exist, which of them are no longer the full
model's, and who reads whom among them.

Axes in the comments: S sequence, Q changed rows, G ghosts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vtwcli.runtime.masks import concerned_rows, muted_columns
from vtwcli.runtime.plan import Plan, PlannedAction
from vtwcli.sweep.reach import closure, reach_of, readable, readers


class Effects(NamedTuple):
    """What acts in a layer without taking tokens away.

    Attributes:
        mutes: in the order of the schedule, without their layers.
        frozen: whether visual rows are not updated.
    """

    mutes: tuple[PlannedAction, ...] = ()
    frozen: bool = False


NOTHING = Effects()


def effects_of(plan: Plan) -> list[Effects]:
    """What acts in each layer of a schedule."""
    return [Effects(plan.muted_as(d), plan.frozen(d)) for d in range(plan.depth)]


@dataclass(eq=False)
class Layout:
    """Which rows of a sample exist and which are no longer the full model's.

    Attributes:
        present: bool [S].
        changed: of those, the ones that differ, or may, bool [S]; all others are read from the full stream.
        rows: positions of the changed ones, [Q].
        place: where a position is among them, [S]; only for changed ones.
    """

    present: Tensor
    changed: Tensor

    def __post_init__(self) -> None:
        self.rows = self.changed.nonzero()[:, 0]
        self.place = self.changed.cumsum(0) - 1

    def find(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Which of ``positions`` [R] are changed rows, bool [R], and where those are among them."""
        there = self.changed[positions]
        return there, self.place[positions[there]]


class Pattern(NamedTuple):
    """Which rows Q' of one state run in a layer, and what they read.

    Attributes:
        query: which of the changed rows, [Q']; None: all of them.
        own: the state's own columns, bool [Q', Q].
        full: the full stream's columns, bool [Q', S].
        reach: how many of the latter are not masked for everyone at the end.
        ghost: columns that stand for others, with another value, bool [Q', G]: since attention is linear in the
            values, a value of zero is a weight set to zero behind the softmax.
        keys: positions of the columns that ghosts stand for, [G].
        values: positions whose value they have, -1 for zero, [G].
    """

    query: Tensor | None
    own: Tensor
    full: Tensor
    reach: int
    ghost: Tensor
    keys: Tensor
    values: Tensor


class Layouts:
    """The layouts and patterns of one sample, each made once.

    Args:
        masks: all masks that occur in the layers, by id, as ``as_bool`` gives them.
        attended, visual: which positions are not padding, and which are visual tokens, bool [S].
        kind: of each position, as the runtime numbers them, int8 [S].
        prompt: number of positions of the prompt.
        compared: positions that are compared behind the last layer, [R].

    Attributes:
        root: where nothing was done.
    """

    def __init__(
        self,
        masks: dict[int, Tensor | None],
        attended: Tensor,
        visual: Tensor,
        kind: Tensor,
        prompt: int,
        compared: Tensor,
    ) -> None:
        self.masks, self.visual, self.kind, self.compared = masks, visual, kind, compared
        self.asks = torch.arange(len(kind), device=kind.device) < prompt
        self.root = Layout(attended, torch.zeros_like(attended))
        self._known = {_name(self.root.present, self.root.changed): self.root}
        self._behind: dict[tuple[int, bytes, Effects], Layout] = {}
        self._patterns: dict[tuple[int, int, Effects, bool], Pattern] = {}

    def behind(self, layout: Layout, key: bytes, present: Tensor, effects: Effects) -> Layout:
        """The layout once only ``present`` rows [S] are left of another's and ``effects`` act.

        Args:
            key: stands for ``present``.
        """
        known = (id(layout), key, effects)
        if known not in self._behind:
            masks = self.masks.values()
            rows = (layout.changed | _readers(masks, layout.present & ~present)) & present
            for mute in effects.mutes:
                rows |= self._muted_rows(mute) & _readers(masks, self._muted_columns(mute, present)) & present
            if effects.frozen:
                rows |= self.visual & present
            changed = closure(masks, rows[None], present[None])[0]
            self._behind[known] = self._known.setdefault(_name(present, changed), Layout(present, changed))
        return self._behind[known]

    def acting(self, effects: Effects, present: Tensor) -> Effects:
        """``effects`` where there is something left for them to act on."""
        return effects if effects == NOTHING or bool((present & self.visual).any()) else NOTHING

    def pattern(self, layout: Layout, effects: Effects, mask: int, last: bool) -> Pattern:
        """What runs in a layer under the mask of that id: the changed rows that are not frozen, of the ``last`` layer
        those that are compared."""
        key = (id(layout), mask, effects, last)
        if key not in self._patterns:
            query = None
            if last:
                query = layout.find(self.compared)[1]
            elif effects.frozen:
                query = (~self.visual[layout.rows]).nonzero()[:, 0]
            self._patterns[key] = self._pattern(layout, effects.mutes, self.masks[mask], query)
        return self._patterns[key]

    def _pattern(
        self, layout: Layout, mutes: Sequence[PlannedAction], mask: Tensor | None, query: Tensor | None
    ) -> Pattern:
        rows = layout.rows if query is None else layout.rows[query]
        allowed = readable(mask, rows[None], len(self.kind))[0] & layout.present
        ghost, keys = allowed[:, :0], rows[:0]
        values = keys
        if mutes:
            allowed, sunk = self._muted(layout, mutes, allowed, rows)
            parts = [(sunk == 1, -1), (sunk == 2, int((layout.present & self.visual).int().argmax()))]
            found = [(allowed & chosen, value) for chosen, value in parts]
            columns = [read.any(0).nonzero()[:, 0] for read, _ in found]
            ghost = torch.cat([read[:, c] for (read, _), c in zip(found, columns, strict=True)], 1)
            keys = torch.cat(columns)
            values = torch.cat(
                [torch.full_like(c, value) for (_, value), c in zip(found, columns, strict=True)]
            )
            allowed = allowed & (sunk == 0)
        full = allowed & ~layout.changed
        return Pattern(query, allowed[:, layout.rows], full, reach_of(full[None]), ghost, keys, values)

    def _muted(
        self, layout: Layout, mutes: Sequence[PlannedAction], allowed: Tensor, rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Who may read whom [Q', S] once ``mutes`` act, and whose value the reader finds: 0 the column's own, 1 zero,
        2 the first visual token's. Of those that overlap the last counts, but none comes back from the softmax."""
        sunk = torch.zeros_like(allowed, dtype=torch.int8)
        for mute in mutes:
            hit = self._muted_rows(mute)[rows][:, None] & self._muted_columns(mute, layout.present)
            if mute.sink == "renormalise":
                allowed = allowed & ~hit
            else:
                sunk = sunk.masked_fill(hit, 1 if mute.sink == "zero" else 2)
        itself = rows[:, None] == torch.arange(allowed.shape[1], device=rows.device)
        return allowed | (itself & ~allowed.any(1, keepdim=True)), sunk

    def _muted_rows(self, mute: PlannedAction) -> Tensor:
        rows = concerned_rows(mute, self.kind)
        return rows if mute.during == "all" else rows & self.asks

    def _muted_columns(self, mute: PlannedAction, present: Tensor) -> Tensor:
        return muted_columns(mute, self.kind) & self.visual & present


def _name(present: Tensor, changed: Tensor) -> tuple[bytes, bytes]:
    return present.cpu().numpy().tobytes(), changed.cpu().numpy().tobytes()


def _readers(masks: Iterable[Tensor | None], columns: Tensor) -> Tensor:
    """Rows [S] that may read one of ``columns`` [S] in some layer."""
    return readers(masks, columns[None])[0]
