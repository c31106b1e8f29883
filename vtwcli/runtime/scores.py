"""Scores of columns, from attention weights or without them, and which tokens are the best by them."""

from __future__ import annotations

import torch

from vtwcli.runtime.contract import PruningError
from vtwcli.runtime.rows import Tensor


def drawn(visual: Tensor, seed: int) -> Tensor:
    """Scores [B, S] that depend on the seed and the number of a sample's ``visual`` tokens only."""
    score = torch.zeros(visual.shape, device=visual.device)
    for row, mine in enumerate(visual):
        draw = torch.rand(int(mine.sum()), generator=torch.Generator().manual_seed(seed))
        score[row, mine] = draw.to(score.device)
    return score


def guided(given: Tensor | None, visual: Tensor) -> Tensor:
    """The scores [B, S] that are ``given`` for a prompt, which tokens of which are ``visual``.

    Raises:
        PruningError: there are none, or they are not this prompt's.
    """
    if given is None:
        raise PruningError(
            "score guided comes from a second model, a guide, and nobody gave its scores: vtw eval and vtw budget run "
            "one, in Python they are the attribute 'given' of what pruned() yields"
        )
    if given.shape != visual.shape:
        raise PruningError(
            f"the guide's scores are {list(given.shape)}, one for each token of a prompt, but the prompt is "
            f"{list(visual.shape)}"
        )
    return given.to(visual.device)


def self_cross(weights: Tensor, visual: Tensor, text: Tensor) -> Tensor:
    """What some query rows add to the two factors of ``self_cross``, [2, B, T].

    Args:
        weights: attention weights [B, H, Q, T].
        visual, text: which of the rows are visual tokens and text, bool [B, Q]; others are fillers.
    """
    largest = weights.to(torch.promote_types(weights.dtype, torch.float32)).amax(1)
    kinds = torch.stack([visual, text]).to(largest.dtype)
    return torch.einsum("bqt,kbq->kbt", largest, kinds)


def last_row_numbers(weights: Tensor, values: Tensor) -> dict[str, Tensor]:
    """Scores of the columns for one query row per sample, each [B, T].

    With c_i the concatenation over heads of w_i v_i and o their sum over all columns: ``contribution`` ||c_i||_2,
    ``attention`` the mean of w_i over heads, ``cosine`` cos(o - c_i, o) (VisiPruner, arXiv 2510.17205).

    Args:
        weights: attention weights [B, H, T].
        values: [B, H_kv, T, D].
    """
    wide = torch.float64 if values.dtype == torch.float64 else torch.float32
    batch, _, columns = weights.shape
    w = weights.to(wide).view(batch, values.shape[1], -1, columns)
    v = values.to(wide)
    output = w @ v
    square = torch.einsum("bkgt,bkt->bt", w.square(), v.square().sum(-1))
    product = (w * (output @ v.transpose(2, 3))).sum((1, 2))
    total = output.square().sum((1, 2, 3))[:, None]
    rest = (total - 2 * product + square).clamp(min=0).sqrt()
    # the smallest denominator is that of torch's cosine_similarity: a token that is all of the output has cosine 0
    cosine = ((total - product) / (rest * total.sqrt()).clamp(min=1e-8)).clamp(-1, 1)
    return {"contribution": square.sqrt(), "attention": w.mean((1, 2)), "cosine": cosine}


def placed(scores: Tensor, position: Tensor, past: int, length: int) -> Tensor:
    """Scores [B, T] of columns at ``position`` [B, T] as those of the ``length`` tokens of a chunk behind ``past``."""
    # entries of earlier turns and fillers go to a slot behind the last, which is cut off
    place = (position - past).masked_fill(position < past, length)
    return scores.new_zeros(len(scores), length + 1).scatter(1, place, scores)[:, :length]


def best(score: Tensor, there: Tensor, wanted: Tensor) -> Tensor:
    """Of those ``there`` [B, S] the ``wanted`` [B] ones of the highest score [B, S], the earlier among equals."""
    order = score.masked_fill(~there, -torch.inf).argsort(dim=1, descending=True, stable=True)
    return there & (order.argsort(dim=1) < wanted[:, None])


def spaced(there: Tensor, wanted: Tensor) -> Tensor:
    """Of those ``there`` [B, S], n in a row, ``wanted`` [B] ones, m of them: the ceil(i n / m)-th for i = 0..m-1."""
    ordinal, total = there.cumsum(1) - 1, there.sum(1)
    return there & ((ordinal * wanted[:, None]) % total.clamp(min=1)[:, None] < wanted[:, None])
