"""Stand-ins for the key/value cache: they record what a layer computes, and let streams share it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vtwcli.errors import VtwError
from vtwcli.runtime.contract import LENT, borrows
from vtwcli.runtime.freeze import entries_of
from vtwcli.sweep.layers import cache_argument

KeysValues = tuple[Tensor, Tensor]


class Lent:
    """Keys and values of rows, by the kind of layer, for later layers that have none of their own."""

    def __init__(self) -> None:
        self._of: dict[str, KeysValues] = {}

    def put(self, layer: nn.Module, entries: KeysValues) -> None:
        """Keep what a layer made, where later ones may borrow it."""
        if lends(layer):
            self._of[layer.self_attn.layer_type] = entries  # type: ignore[union-attr]

    def get(self, layer: nn.Module) -> KeysValues | None:
        """What a layer borrows; None if it has keys and values of its own."""
        attention: Any = getattr(layer, "self_attn", None)
        return self._of[attention.layer_type] if borrows(attention) else None

    def __getitem__(self, kind: str) -> KeysValues:
        return self._of[kind]

    def __contains__(self, kind: str) -> bool:
        return kind in self._of

    def made(self, of: Callable[[str, KeysValues], KeysValues]) -> Lent:
        """A new one, with what ``of`` makes of the entries of each kind."""
        one = Lent()
        one._of = {kind: of(kind, entries) for kind, entries in self._of.items()}
        return one


def lends(layer: nn.Module) -> bool:
    """Whether later layers may borrow a layer's keys and values."""
    return bool(getattr(getattr(layer, "self_attn", None), "store_full_length_kv", False))


class Cache:
    """Stands in for a key/value cache: ``read`` gets the keys and values [B, H, n, E] of the layer's rows and
    returns those that its attention shall read."""

    def __init__(self, read: Callable[[Tensor, Tensor], KeysValues]) -> None:
        self._read = read
        self.updates = 0

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> KeysValues:
        """Called by the layer once."""
        self.updates += 1
        return self._read(keys, values)

    def get_seq_length(self, *_: Any) -> int:
        """Nothing stands before the rows that run."""
        return 0


def run(
    layer: nn.Module, hidden: Tensor, kwargs: dict[str, Any], read: Callable, own: KeysValues | None = None
) -> Tensor:
    """The stock layer's output for ``hidden`` [B, n, D] with ``read`` as its cache.

    Args:
        own: keys and values of the rows where the layer borrows them, see ``Lent``.
    """
    cache, attention = Cache(read), getattr(layer, "self_attn", None)
    if LENT in kwargs:
        kwargs = {**kwargs, LENT: {} if own is None else {attention.layer_type: cache.update(*own)}}
    out = layer(hidden, **{**kwargs, cache_argument(layer): cache})
    if cache.updates != 1:
        raise VtwError(f"{type(layer).__name__} asked its cache {cache.updates} times, not once")
    return (out[0] if isinstance(out, tuple) else out).to(hidden.device)


def keys_values(layer: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> KeysValues:
    """Only the keys and values of the rows: the layer is left as soon as it has computed them."""
    entries = entries_of(layer, cache_argument(layer), {**kwargs, "hidden_states": hidden})
    if entries is None:
        raise VtwError(f"{type(layer).__name__} did not ask its cache")
    return entries


class Shared:
    """One buffer of keys and values that all chunks of a layer read: [own rows | the full stream's columns]."""

    def __init__(self, own: int, keys: Tensor, values: Tensor) -> None:
        self.own = own
        self.keys, self.values = (
            torch.cat([x.new_empty(*x.shape[:2], own, x.shape[3]), x], dim=2) for x in (keys, values)
        )

    def reader(self, reach: int, own: KeysValues | None = None) -> Callable[[Tensor, Tensor], KeysValues]:
        """A cache function that puts a chunk's own rows right before the first ``reach`` shared columns.

        The own rows are those that the layer hands over, or ``own`` where they are known already.
        """

        def read(keys: Tensor, values: Tensor) -> KeysValues:
            keys, values = own or (keys, values)
            start = self.own - keys.shape[2]
            self.keys[:, :, start : self.own], self.values[:, :, start : self.own] = keys, values
            window = slice(start, self.own + reach)
            return self.keys[:, :, window], self.values[:, :, window]

        return read

    def taken(self, count: int) -> KeysValues:
        """The last chunk's own rows, of which there are ``count``."""
        own = slice(self.own - count, self.own)
        return self.keys[:, :, own].clone(), self.values[:, :, own].clone()
