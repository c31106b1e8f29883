"""Frozen layers: visual rows get as far as their keys and values, the others run and read them."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch

from vtwcli.runtime.asking import not_compiled
from vtwcli.runtime.contract import borrows, strange
from vtwcli.runtime.rows import TEXT, Split, Tensor, take, take_positions
from vtwcli.runtime.tap import Frozen, Tap, tap_of


class Enough(Exception):
    """A layer has shown what was wanted of it; the rest of it need not run."""


class _Handed:
    """Stands where the cache stands, and ends the layer's call as soon as it is handed keys and values."""

    def __init__(self, cache: Any) -> None:
        self.cache = cache
        self.entries: tuple[Tensor, Tensor] | None = None

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As a cache's."""
        self.entries = keys, values
        raise Enough

    def get_seq_length(self, *args: Any, **kwargs: Any) -> Any:
        """As the cache's."""
        return 0 if self.cache is None else self.cache.get_seq_length(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["cache"], name)


class _NoQuery(torch.nn.Module):
    """Stands where the projection of queries stands, for rows that ask nothing: one head of zeros."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden.new_zeros(()).expand(*hidden.shape[:-1], self.width)


def part(
    layer: torch.nn.Module, name: str, kwargs: dict[str, Any], split: Split, by_row: Iterable[str] = ()
) -> Frozen:
    """Let a frozen layer's arguments be those of the rows that run; what the others leave to them comes back.

    Args:
        layer: of the model.
        name: by which it takes its cache.
        kwargs: its arguments for all rows; changed in place.
        split: the rows.
        by_row: names of arguments that have a row for each token.

    Raises:
        PruningError: a layer that does not hand its keys and values to the cache.
    """
    hidden, attention = kwargs["hidden_states"], getattr(layer, "self_attn", None)
    entries = None
    if not borrows(attention):
        given = {**kwargs, "hidden_states": take(hidden, split.read_at, 1), "attention_mask": None}
        take_positions(given, split.read_at, hidden.shape[1], attention, by_row)
        entries = entries_of(layer, name, given)
        if entries is None:
            raise strange(f"{type(layer).__name__} does not hand its keys to the cache")
    kwargs["hidden_states"] = take(hidden, split.run_at, 1)
    take_positions(kwargs, split.run_at, hidden.shape[1], attention, by_row)
    return Frozen(split, hidden, entries)


def entries_of(layer: Any, name: str, given: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
    """Keys and values of the rows that a layer is given; it runs no further than it must for them.

    Args:
        layer: of a model.
        name: by which it takes its cache.
        given: its arguments by name.

    Returns:
        What it hands to its cache; None if that is nothing.
    """
    handed = _Handed(given.get(name))
    for one in (without_query(layer), layer):
        try:
            one.forward(**{**given, name: handed})
            break
        except Enough:
            return handed.entries
        except RuntimeError:
            if one is layer:
                raise  # else the stand-in does not fit
    return None


def without_query(layer: Any) -> Any:
    """A copy of the layer, sharing its weights, that computes no queries; itself where these are not computed apart,
    or where forward was wrapped (accelerate), since the wrapper runs the original."""
    attention: Any = getattr(layer, "self_attn", None)
    query, width = getattr(attention, "q_proj", None), getattr(attention, "head_dim", None)
    if not isinstance(query, torch.nn.Module) or isinstance(query, _NoQuery) or not isinstance(width, int):
        return layer
    if any("forward" in x.__dict__ for x in (layer, attention, query)):
        return layer
    layer, attention = copy.copy(layer), copy.copy(attention)
    attention._modules = {**attention._modules, "q_proj": _NoQuery(width)}
    layer._modules = {**layer._modules, "self_attn": attention}
    return layer


def leave_layer(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    """Put the rows that ran among those of a frozen layer that did not, or back where all of them ran."""
    tap = tap_of(kwargs)
    return output if tap is None else _leave_layer(args, kwargs, output, tap)


@not_compiled
def _leave_layer(args: tuple, kwargs: dict[str, Any], output: Any, tap: Tap) -> Any:
    if tap.call.visual is None or not tap.call.plan.frozen(tap.layer):
        return output
    before = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    after = output[0] if isinstance(output, tuple) else output
    if not isinstance(after, torch.Tensor) or after.shape != before.shape:
        raise strange(f"layer {tap.layer} does not return hidden states of the shape it is given")
    before = before.to(after.device)
    if tap.frozen is None:
        visual = tap.call.kinds(tap.rows, after.device)[:, :, None] != TEXT
        after = torch.where(visual, before, after)
    else:
        split = tap.frozen.split
        after = torch.where(split.written.to(after.device)[:, :, None], after, before)
        place = split.run_at.to(after.device)[:, :, None].expand_as(after)
        after = tap.frozen.hidden.to(after.device).scatter(1, place, after)
    return (after, *output[1:]) if isinstance(output, tuple) else after
