"""What rules that choose visual tokens in front of the language model share. Ties go to the lower index everywhere."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from vtwcli.runtime.picture import Picked, Picture
from vtwcli.runtime.rows import Tensor

Rule = Callable[..., Picked]


def selector(rule: Rule) -> Rule:
    """A rule that keeps all as it is where ``count`` is at least the number of tokens, and nothing where it is 0.

    The rule itself sees counts between; None where a rule finds the count itself.
    """

    @wraps(rule)
    def chosen(picture: Picture, count: int | None = None, **parameters: Any) -> Picked:
        tokens = len(picture.embeds)
        few = tokens if count is None else min(max(count, 0), tokens)
        if few == 0 or (few == tokens and count is not None):
            return Picked(torch.arange(few, device=picture.embeds.device))
        return rule(_together(picture), count, **parameters)

    return chosen


def _together(picture: Picture) -> Picture:
    """With all tensors where the embeddings are: tower and language model may lie on different devices."""
    device = picture.embeds.device
    layers: dict[str, Any] = {
        name: {layer: one.to(device) for layer, one in getattr(picture, name).items()}
        for name in ("cls", "received", "keys", "queries")
    }
    features = None if picture.features is None else picture.features.to(device)
    return picture._replace(question=picture.question.to(device), features=features, **layers)


def wide(values: Tensor) -> Tensor:
    """``values`` in float32, or in float64 where they are."""
    return values.to(torch.float64 if values.dtype == torch.float64 else torch.float32)


def unit(rows: Tensor) -> Tensor:
    """Rows of length 1; a row of zeros stays."""
    return torch.nn.functional.normalize(wide(rows), dim=-1)


def top(scores: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` largest, in falling order."""
    return scores.argsort(descending=True, stable=True)[:count]


def without(tokens: int, *taken: Tensor) -> Tensor:
    """Ascending indices of 0..tokens-1 that are in none of ``taken``."""
    free = torch.ones(tokens, dtype=torch.bool, device=taken[0].device)
    for one in taken:
        free[one] = False
    return free.nonzero()[:, 0]


def scaled(layer: int, depth: int) -> int:
    """A layer of a tower with 24 at the same share of ``depth``."""
    return min(round(layer / 24 * depth), depth - 1)


def penultimate(depth: int) -> int:
    """The layer whose output towers like CLIP's hand to the projector."""
    return max(depth - 2, 0)


def salience(picture: Picture, layer: int) -> Tensor:
    """What the class token pays each patch in a tower layer, mean over heads, [N].

    Where there is no class token: the mean attention that the patch receives.
    """
    if layer in picture.cls:
        return wide(picture.cls[layer]).mean(0)
    return wide(picture.received[layer])


def source(picture: Picture) -> tuple[Tensor, Tensor, bool]:
    """What rules compare and merge: rows of tokens [N, C], the class token's [0 or 1, C], whether behind the projector.

    They are what the projector reads, or the language model's input where a token is not one patch.
    """
    if picture.features is None:
        return picture.embeds, picture.embeds[:0], True
    tokens = len(picture.embeds)
    return picture.features[-tokens:], picture.features[: len(picture.features) - tokens], False


def answer(kept: Tensor, rows: Tensor, like: Tensor, behind: bool) -> Picked:
    """``rows`` in ``like``'s precision, on the side of the projector from which they were taken."""
    rows = rows.to(like.dtype)
    return Picked(kept, embeds=rows) if behind else Picked(kept, rows=rows)


def windows(picture: Picture, side: int) -> list[Tensor]:
    """Tokens of ``side`` x ``side`` equal windows of the grid, window rows first; fewer where the grid is smaller.

    Where the tokens have no single grid: as many consecutive ranges.
    """
    tokens, device = len(picture.embeds), picture.embeds.device
    index = torch.arange(tokens, device=device)
    if picture.grid is None or picture.grid[0] * picture.grid[1] != tokens:
        return [one for one in index.tensor_split(side * side) if len(one)]
    bands = index.view(picture.grid).tensor_split(side)
    return [one.flatten() for band in bands for one in band.tensor_split(side, 1) if one.numel()]
