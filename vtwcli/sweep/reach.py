"""Who reads whom: the rows that an intervention can reach, and the masks that say so."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vtwcli.errors import VtwError
from vtwcli.runtime.masks import additive


def as_bool(mask: Tensor | None) -> Tensor | None:
    """A recorded attention mask [B or 1, 1, S, S] as bool [B or 1, S, S]; None stands for causal.

    Raises:
        VtwError: a mask of another shape, or one that adds a bias to the scores.
    """
    if mask is None:
        return None
    if mask.ndim != 4 or mask.shape[1] != 1:
        raise VtwError(f"the sweep does not understand an attention mask of shape {list(mask.shape)}")
    if mask.dtype == torch.bool:
        return mask[:, 0]
    allowed = mask == 0
    if not bool((allowed | (mask <= torch.finfo(mask.dtype).min / 2)).all()):
        raise VtwError("the sweep does not understand an attention mask that adds a bias")
    return allowed[:, 0]


def explicit(allowed: Tensor, eager: bool, dtype: torch.dtype) -> Tensor:
    """A bool mask in the form that the attention implementation takes; eager attention adds it to the scores."""
    return additive(allowed, dtype) if eager else allowed


def readable(mask: Tensor | None, rows: Tensor, length: int) -> Tensor:
    """Which of ``length`` columns ``rows`` [B, Q] may read under a layer's own ``mask``: bool [B, Q, S]."""
    if mask is None:
        return torch.arange(length, device=rows.device) <= rows[:, :, None]
    return mask.expand(len(rows), -1, -1).gather(1, rows[:, :, None].expand(-1, -1, length))


def readers(masks: Iterable[Tensor | None], columns: Tensor) -> Tensor:
    """Rows [B, S] that may read one of ``columns`` [B, S] in some layer."""
    found = torch.zeros_like(columns)
    for mask in masks:
        found |= columns.cumsum(1) > 0 if mask is None else (mask & columns[:, None, :]).any(-1)
    return found


def reached(kind: str, masks: Sequence[Tensor | None], visual: Tensor, attended: Tensor) -> Tensor:
    """Rows [B, S] whose values an intervention of this kind can change.

    Args:
        masks: all masks that occur in the layers, as ``as_bool`` gives them.
        visual, attended: which positions are visual tokens and which are not padding, [B, S].
    """
    text = attended & ~visual
    if kind == "freeze":
        rows, living = visual, attended
    else:
        # Nobody reads withdrawn tokens, so what becomes of them does not matter.
        rows, living = text & readers(masks, visual), text if kind == "withdraw" else attended
    return closure(masks, rows, living)


def closure(masks: Iterable[Tensor | None], rows: Tensor, living: Tensor) -> Tensor:
    """``rows`` with all ``living`` ones that read them, those that read these, and so on, [B, S]."""
    masks = list(masks)
    while True:
        more = rows | (living & readers(masks, rows))
        if torch.equal(more, rows):
            return rows
        rows = more


def take(hidden: Tensor, rows: Tensor) -> Tensor:
    """Rows [B, Q] of a stream [B, S, ...]: [B, Q, ...]."""
    index = rows[(...,) + (None,) * (hidden.ndim - 2)]
    return hidden.gather(1, index.expand(-1, -1, *hidden.shape[2:]))


def rotary(embedding: Tensor, rows: Tensor, times: int) -> Tensor:
    """``times`` copies, one behind the other, of a rotary embedding [..., B or 1, S, E] at ``rows`` [B, Q]."""
    index = rows[(None,) * (embedding.ndim - 3)].unsqueeze(-1)
    return torch.cat([embedding.take_along_dim(index, -2)] * times, dim=-2)


def diagonal(own: Sequence[Tensor], full: Sequence[Tensor]) -> Tensor:
    """The mask [B, M*Q', M*Q + n] of M streams that read their own rows [B, Q', Q] and shared columns [B, Q', n]."""
    batch, rows, count = own[0].shape
    streams = len(own)
    mask = own[0].new_zeros(batch, streams, rows, streams * count + full[0].shape[2])
    for m in range(streams):
        mask[:, m, :, m * count : (m + 1) * count] = own[m]
        mask[:, m, :, streams * count :] = full[m]
    return mask.flatten(1, 2)


class Pattern(NamedTuple):
    """What one stream may read in a layer: own rows [B, Q', Q], the full stream's columns [B, Q', S], and how many
    of the latter are not masked for everyone at the end."""

    own: Tensor
    full: Tensor
    reach: int


def reach_of(columns: Tensor) -> int:
    """One more than the last column that any row of ``columns`` [B, Q, S] reads."""
    used = columns.flatten(0, 1).any(0).nonzero()
    return int(used[-1]) + 1 if len(used) else 0
