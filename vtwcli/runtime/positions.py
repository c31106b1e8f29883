"""Positions behind tokens that left, where these are closed up: the model's own rotary embeddings, asked again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vtwcli.runtime.contract import POSITIONS, PruningError, arguments, strange
from vtwcli.runtime.rows import Tensor, compact


@dataclass(eq=False)
class Turned:
    """One call of a model's rotary embedding: its module, its arguments by name, what came out."""

    module: Any
    given: dict[str, Any]
    output: Any

    @classmethod
    def of(cls, module: Any, args: tuple, kwargs: Mapping[str, Any], output: Any) -> Turned:
        """As a forward hook gets it."""
        return cls(module, arguments(module, args, kwargs), output)

    def lowered(self, by: Tensor) -> Any:
        """The same for positions that are lower, each by as much as ``by`` [B, S or 1] says.

        Raises:
            PruningError: positions that cannot be renumbered.
        """
        ids = self.given.get("position_ids")
        if not isinstance(ids, torch.Tensor):
            raise strange(f"{type(self.module).__name__} takes no position_ids")
        return self.module.forward(**{**self.given, "position_ids": lower(ids, by)})


def lower(ids: Tensor, by: Tensor) -> Tensor:
    """Position ids [1 or B, S], lowered.

    Raises:
        PruningError: they have several axes.
    """
    if ids.ndim != 2:
        raise PruningError(
            "positions: compact: this model counts positions along time, rows and columns of an image, and no rule "
            "says how to number those anew; use positions: original"
        )
    return ids - by.to(ids.device)


def gone_at(gone: Tensor, past: int, old: Tensor | None) -> Tensor:
    """Where in the whole sequence the tokens are that are ``gone`` [B, S] of a chunk, behind ``old`` ones; [B, G]."""
    rows = compact(gone)
    assert rows.index is not None
    index = (rows.index + past).masked_fill(~rows.query, -1)
    return index if old is None else torch.cat([old.to(index.device), index], 1)


def lowering(gone: Tensor | None, old: Tensor | None) -> Tensor | None:
    """By how much positions of a chunk's tokens are lower, [B, S or 1]; None: not at all.

    Args:
        gone: tokens of the chunk that those behind them close up to, [B, S].
        old: where earlier ones were, [B, G].
    """
    by = None if gone is None else gone.cumsum(1) - gone.long()
    if old is not None:
        before = (old >= 0).sum(1, keepdim=True)
        by = before if by is None else by + before.to(by.device)
    return by


def renumber(kwargs: dict[str, Any], by: Tensor, angles: list[Turned], memo: dict[Any, Any]) -> None:
    """Lower all that tells rows their positions, in a layer's arguments for a whole chunk.

    Args:
        by: see ``lowering``.
        angles: what the model's rotary embeddings gave in this forward pass.
        memo: shares the work between layers.

    Raises:
        PruningError: positions that cannot be renumbered.
    """
    for name in [name for name, value in kwargs.items() if name.startswith(POSITIONS) and value is not None]:
        value = kwargs[name]
        turned = next((one for one in angles if one.output is value), None)
        if turned is None:
            raise strange(f"the layers get {name} that no rotary embedding of the text model gave")
        key = ("turned", id(value), id(by))
        if key not in memo:
            memo[key] = turned.lowered(by), value, by
        kwargs[name] = memo[key][0]
    ids = kwargs.get("position_ids")
    if isinstance(ids, torch.Tensor):
        kwargs["position_ids"] = lower(ids, by)
