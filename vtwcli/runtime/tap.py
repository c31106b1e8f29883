"""What stands where the cache stands while a layer runs, so that its hooks get at keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from vtwcli.runtime.cache import Columns
from vtwcli.runtime.call import Call
from vtwcli.runtime.contract import CACHE_NAMES
from vtwcli.runtime.masks import sunk
from vtwcli.runtime.plan import PlannedAction
from vtwcli.runtime.rows import Rows, Split, Tensor


@dataclass(eq=False)
class Frozen:
    """What of a frozen layer does not run.

    Attributes:
        split: its rows.
        hidden: their hidden states, [B, S, D].
        entries: keys and values of those that only have these; None where the layer borrows them all.
    """

    split: Split
    hidden: Tensor
    entries: tuple[Tensor, Tensor] | None


@dataclass(eq=False)
class Tap:
    """Stands where the cache stands in one layer's call: keeps keys and values, may hand out other values.

    Attributes:
        cache: the model's, or None.
        call, layer, rows, columns, past: of the forward pass and the layer; ``columns`` None: those of a stock layer.
        base: mutes whose values the attention itself is given.
        second: mutes whose values text rows are given in a pass of their own, or None.
        skips: whether text rows are given text entries only, in a pass of their own.
        given: the mask that the model made.
        probes: whether the last row is to be looked at.
        due: whether the attention's hook still has something to do.
        frozen: what of a frozen layer does not run, or None.
    """

    cache: Any
    call: Call
    layer: int
    rows: Rows
    columns: Columns | None
    past: int
    base: list[PlannedAction]
    second: list[PlannedAction] | None
    skips: bool
    given: Tensor | None
    probes: bool
    due: bool
    frozen: Frozen | None = None
    keys: Tensor | None = None
    values: Tensor | None = None

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As a cache's."""
        if self.frozen is not None and self.frozen.entries is not None:
            keys, values = (
                torch.cat(two, 2) for two in zip(self.frozen.entries, (keys, values), strict=True)
            )
        if self.cache is not None:
            keys, values = self.cache.update(keys, values, *args, **kwargs)
        self.keys, self.values = keys, values
        return keys, values if self.columns is None else sunk(values, self.columns, self.base)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["cache"], name)


def tap_of(kwargs: dict[str, Any]) -> Tap | None:
    """The ``Tap`` that a call was given for its cache; ``torch.compile`` follows the search for it."""
    caches = [kwargs[name] for name in CACHE_NAMES if isinstance(kwargs.get(name), Tap)]
    return caches[0] if caches else None
