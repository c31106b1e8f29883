"""What probes see of a layer: the full stream around it, and the attention of single rows in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vtwcli.errors import VtwError
from vtwcli.runtime import asking, contract
from vtwcli.runtime.contract import PruningError
from vtwcli.runtime.freeze import Enough
from vtwcli.sweep.caches import Cache
from vtwcli.sweep.layers import cache_argument
from vtwcli.sweep.reach import take


@dataclass(frozen=True, eq=False)
class LayerView:
    """The full stream at one layer, for probes.

    Attributes:
        item: number of the item in the sweep.
        index: 0-based layer.
        layer: the stock decoder layer, ready to run.
        visual, attended: which positions are visual tokens and which are not padding, bool [B, S].
        rows: the item's compared positions, [B, R].
        hidden_in: the layer's input, [B, S, D].
        out: the layer's output at the compared positions, [B, R, D].
        keys, values: what its attention read, after rotary embedding, [B, H, S, E].
    """

    item: int
    index: int
    layer: nn.Module
    visual: Tensor
    attended: Tensor
    rows: Tensor
    hidden_in: Tensor
    out: Tensor
    keys: Tensor
    values: Tensor
    _arguments: Callable[[Tensor], dict[str, Any]]  # the layer's, for rows [B, R], with an additive mask

    def attention(self, rows: Tensor | None = None) -> Tensor:
        """Attention weights of ``rows`` [B, R] (the compared ones by default), [B, heads, R, S]; float32 or wider.

        Only these rows run, and only up to the weights.

        Raises:
            VtwError: a layer whose attention does not return its weights.
        """
        rows = self.rows if rows is None else rows
        hidden = take(self.hidden_in, rows)
        weights = row_weights(self.layer, hidden, self._arguments(rows), self.keys, self.values)
        return weights.to(torch.promote_types(weights.dtype, torch.float32))


Probe = Callable[[LayerView], None]


def check_values(layer: nn.Module, values: Tensor) -> None:
    """Refuse keys and values [B, H, S, E] of a layer that are compressed, where their numbers count.

    Raises:
        VtwError: they are.
    """
    try:
        contract.check_values(getattr(layer, "self_attn", None), values)
    except PruningError as error:
        raise VtwError(str(error)) from error


def row_weights(
    layer: nn.Module, hidden: Tensor, kwargs: dict[str, Any], keys: Tensor, values: Tensor
) -> Tensor:
    """Attention weights [B, heads, R, S] of the rows ``hidden`` [B, R, D], as the pruned model computes them.

    The layer runs up to its attention, which the runtime then runs for these rows. The hook that stops it knows the
    call by its cache, so no other thread is disturbed.

    Args:
        layer: a stock decoder layer.
        kwargs: its arguments for these rows, without the cache.
        keys, values: what the rows may read, [B, H, S, E].

    Raises:
        VtwError: a layer that is not understood.
    """
    module = getattr(layer, "self_attn", None)
    if not isinstance(module, nn.Module):
        raise VtwError(f"{type(layer).__name__} has no self_attn")
    name, cache = cache_argument(module), Cache(lambda *_: (keys, values))
    given: dict[str, Any] = {}

    def stop(_: nn.Module, args: tuple, called: dict[str, Any]) -> None:
        if called.get(name) is cache:
            given.update({"hidden_states": args[0]} if args else {}, **called)
            raise Enough

    handle = module.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        layer(hidden, **{**kwargs, cache_argument(layer): cache})
    except Enough:
        pass
    finally:
        handle.remove()
    if given.get("attention_mask") is None:
        raise VtwError(f"{type(layer).__name__} does not hand its cache and its mask to its attention")
    rows = torch.arange(hidden.shape[1], device=hidden.device).expand(hidden.shape[:2])
    try:
        return asking.row_weights(module, given, rows, given["attention_mask"], keys, values)
    except PruningError as error:
        raise VtwError(str(error)) from error
