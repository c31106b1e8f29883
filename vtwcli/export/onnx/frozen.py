"""Frozen layers in graphs: text rows run, visual rows hand over keys and values, as in the runtime.

Where which rows are comes in as inputs, since a graph cannot tell. A batch row with fewer of a kind than another names
its last token again: what is computed twice is written twice, to the same place.
Axes: B batch, S rows, T text rows, V visual rows, D hidden size, H heads, C their width.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vtwcli.export.onnx.modules import gather, shallow
from vtwcli.runtime.freeze import entries_of, without_query
from vtwcli.sweep.layers import cache_argument


@dataclass(eq=False)
class Parts:
    """Where the two kinds of rows are, ``text`` [B, T] and ``visual`` [B, V]; given anew to each call of the layers."""

    text: Tensor | None = None
    visual: Tensor | None = None


class _Joined:
    """Stands before the cache, and puts the keys and values of both kinds of rows [B, H, S, C] in its tokens' order."""

    def __init__(self, cache: Any, parts: Parts, length: int, entries: tuple[Tensor, Tensor]) -> None:
        self.cache, self.parts, self.length, self.entries = cache, parts, length, entries

    def get_seq_length(self, *args: Any) -> Any:
        """As the cache's."""
        return self.cache.get_seq_length(*args)

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As the cache's."""
        found = []
        for text, visual in zip((key, value), self.entries, strict=True):
            room = text.new_zeros(text.shape[0], self.length, text.shape[1], text.shape[3])
            for index, rows in ((self.parts.visual, visual), (self.parts.text, text)):
                assert index is not None
                room = _put(room, index, rows.transpose(1, 2))
            found.append(room.transpose(1, 2))
        both: tuple[Tensor, Tensor] = self.cache.update(*found, *args, **kwargs)
        return both


def freeze(layer: Any, parts: Parts) -> None:
    """Let a layer, which must be a copy, not update visual rows."""
    stock = shallow(layer)
    stock._forward_hooks = OrderedDict()
    bare = shallow(without_query(stock))
    # the exporter keeps a stack of the modules that are called; this one is left before it returns
    bare._modules["self_attn"] = bare.self_attn.forward
    layer.forward = partial(_forward, stock, bare, parts)


def _forward(layer: nn.Module, bare: nn.Module, parts: Parts, hidden_states: Tensor, **kwargs: Any) -> Tensor:
    """Hidden states [B, S, D]; arguments as the stock ``layer``'s, of which ``bare`` computes no queries."""
    name = cache_argument(layer)
    assert parts.text is not None and parts.visual is not None
    entries = entries_of(bare, name, _rows(kwargs, hidden_states, parts.visual))
    assert entries is not None
    given = _rows(kwargs, hidden_states, parts.text)
    given[name] = _Joined(kwargs[name], parts, hidden_states.shape[1], entries)
    out = layer(**given)
    return _put(hidden_states, parts.text, out[0] if isinstance(out, tuple) else out)


def _rows(kwargs: dict[str, Any], hidden: Tensor, index: Tensor) -> dict[str, Any]:
    """A layer's arguments for the rows ``index`` only."""
    batch = torch.arange(index.shape[0], device=index.device)[:, None]
    given = {**kwargs, "hidden_states": gather(hidden, index)}
    given["attention_mask"] = gather(kwargs["attention_mask"][:, 0], index)[:, None]
    given["position_embeddings"] = tuple(x[..., batch, index, :] for x in kwargs["position_embeddings"])
    if kwargs.get("position_ids") is not None:
        given["position_ids"] = kwargs["position_ids"][..., batch, index]
    return given


def _put(x: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """``x`` [B, S, ...] with ``rows`` [B, T, ...] at ``index`` [B, T]."""
    return x.index_put((torch.arange(index.shape[0], device=index.device)[:, None], index), rows)
