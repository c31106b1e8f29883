"""Stand-ins for the key/value cache: they record what a layer computes, and let streams share it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vtwcli.errors import VtwError
from vtwcli.runtime.freeze import entries_of
from vtwcli.sweep.layers import cache_argument

KeysValues = tuple[Tensor, Tensor]


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


def run(layer: nn.Module, hidden: Tensor, kwargs: dict[str, Any], read: Callable) -> Tensor:
    """The stock layer's output for ``hidden`` [B, n, D] with ``read`` as its cache."""
    cache = Cache(read)
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
