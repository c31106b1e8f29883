"""Which of the visual tokens that are there a number of them is, by scores or without any."""

from __future__ import annotations

import torch

from vtwcli.runtime.rows import Tensor


def best(score: Tensor, there: Tensor, wanted: Tensor) -> Tensor:
    """Of those ``there`` [B, S] the ``wanted`` [B] ones of the highest score [B, S], the earlier among equals."""
    order = score.masked_fill(~there, -torch.inf).argsort(dim=1, descending=True, stable=True)
    return there & (order.argsort(dim=1) < wanted[:, None])


def spaced(there: Tensor, wanted: Tensor) -> Tensor:
    """Of those ``there`` [B, S], n in a row, ``wanted`` [B] ones, m of them: the ceil(i n / m)-th for i = 0..m-1."""
    ordinal, total = there.cumsum(1) - 1, there.sum(1)
    return there & ((ordinal * wanted[:, None]) % total.clamp(min=1)[:, None] < wanted[:, None])


def drawn(visual: Tensor, seed: int) -> Tensor:
    """Scores [B, S] that depend on the seed and the number of a sample's ``visual`` tokens only."""
    score = torch.zeros(visual.shape, device=visual.device)
    for row, number in enumerate(visual.sum(1).tolist()):
        draw = torch.rand(number, generator=torch.Generator().manual_seed(seed))
        score[row, visual[row]] = draw.to(score.device)
    return score
