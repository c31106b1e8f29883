"""What an attention of a vision tower attends to: one row of its weights and their sums, block by block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from vtwcli.runtime.asking import running_as
from vtwcli.runtime.contract import PruningError
from vtwcli.runtime.masks import additive
from vtwcli.runtime.rows import Tensor

_KIND = "vtw_tower"  # the attention that looks
_BLOCK = 256  # rows whose weights exist at a time


@dataclass(eq=False)
class Chunk:
    """One call of a layer's attention: the class token's weights [I, H, S], those received [I, S], summed over rows."""

    cls: Tensor | None
    received: Tensor | None


def looked_at(module: Any, args: tuple, kwargs: dict[str, Any], cls: bool, received: bool) -> list[Chunk]:
    """Run an attention on what it was given up to queries and keys, and look at these."""
    from transformers import AttentionInterface

    AttentionInterface.register(_KIND, _summarised)
    one = running_as(module, _KIND)
    found: list[Chunk] = []
    one.__dict__["vtw_wants"] = (cls, received, found)
    one.forward(*args, **kwargs)
    if not found:
        raise PruningError("the attention of this model's vision tower is not understood")
    return found


def _summarised(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function of the library's form that looks at the weights and returns zeros."""
    cls, received, found = module.vtw_wants
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    query, key = query.to(wide), key.to(wide)
    if key.shape[1] != query.shape[1]:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    if attention_mask is not None and attention_mask.ndim == 2:
        attention_mask = attention_mask[:, None, None, :].bool()
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        attention_mask = additive(attention_mask, wide)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling

    def weights(rows: slice) -> Tensor:
        scores = query[:, :, rows] @ key.transpose(2, 3) * scale
        if attention_mask is not None:
            every = attention_mask.shape[2] == 1
            scores = scores + attention_mask[:, :, slice(None) if every else rows].to(wide)
        return scores.softmax(-1)

    total = None
    if received:
        total = query.new_zeros(query.shape[0], key.shape[2])
        for begin in range(0, query.shape[2], _BLOCK):
            total += weights(slice(begin, begin + _BLOCK)).mean(1).sum(1)
    found.append(Chunk(weights(slice(0, 1))[:, :, 0] if cls else None, total))
    shape = (query.shape[0], query.shape[2], query.shape[1], value.shape[-1])
    return value.new_zeros(shape), None
