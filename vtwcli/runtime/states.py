"""Scores of visual tokens by hidden states: what a layer changed in them, and how much they double others."""

from __future__ import annotations

import torch

from vtwcli.runtime.rows import Tensor
from vtwcli.schedule.words import PIVOTS


def wide(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def change(before: Tensor, now: Tensor) -> Tensor:
    """The distance [B, T] between two states [B, T, D] of rows."""
    return (wide(now) - wide(before.to(now.device))).norm(dim=-1)


def distinct(states: Tensor, others: Tensor, sizes: Tensor, other_sizes: Tensor, wanted: int) -> Tensor:
    """Which of V visual rows are least like pivots, and so keep what many share out; a DART step (2502.11494).

    Pivots are the rows of the largest sizes, of the visual ones and of others. In the order of the sequence each takes,
    of those that are left, the ones with the smallest cosine to it; the first take one more where they do not share
    evenly.

    Args:
        states, others: of visual rows [V, D] and of text rows [T, D].
        sizes, other_sizes: [V] and [T].
        wanted: number of rows to be chosen, at most V.

    Returns:
        bool [V], with ``wanted`` of them true.
    """
    chosen = torch.zeros(len(states), dtype=torch.bool, device=states.device)
    first = sizes.topk(min(PIVOTS[0], wanted)).indices.sort().values
    chosen[first] = True
    text = other_sizes.topk(min(PIVOTS[1], len(others))).indices.sort().values
    pivots = torch.cat([states[first], others[text]])
    each, more = divmod(wanted - len(first), max(len(pivots), 1))
    for number, pivot in enumerate(pivots):
        alike = torch.cosine_similarity(pivot[None], states, dim=-1).masked_fill(chosen, torch.inf)
        chosen[alike.argsort(stable=True)[: each + (number < more)]] = True
    return chosen
