"""Rules that keep what a vision tower's attention points at: HiPrune, HoloV, the first of two cuts."""

from __future__ import annotations

import torch

from vtwcli.runtime.picture import Picked, Picture
from vtwcli.runtime.rows import Tensor
from vtwcli.runtime.select_parts import penultimate, salience, scaled, selector, top, unit, wide, without


@selector
def hiprune(picture: Picture, count: int, alpha: float = 0.1, object_layer: int = 8) -> Picked:
    """HiPrune (arXiv 2508.00553): anchors of an object layer with the tokens around them, then what is left by the end.

    Anchors are the round(count * alpha / 5) that receive most in the object layer; the tokens before, behind, above
    and below each stay too (clamped to the image, no care for a row's end, as in the published code). The rest are
    those that receive most in the layer before the last. What a patch receives is the mean over heads and all query
    rows, so no class token is needed. Kept rows stand in sequence order.

    Args:
        alpha: share of the count for anchors and the tokens around them.
        object_layer: of a tower with 24, scaled to the tower's depth.
    """
    tokens = len(picture.embeds)
    columns = picture.grid[1] if picture.grid else round(tokens**0.5)
    early = wide(picture.received[scaled(object_layer, picture.depth)])
    late = wide(picture.received[penultimate(picture.depth)])
    anchors = top(early, round(count * alpha / 5))
    around = [(anchors + step).clamp(0, tokens - 1) for step in (-1, 1, -columns, columns)]
    chosen = _once(torch.cat([anchors, *around]))[:count]
    rest = top(late.index_fill(0, chosen, -torch.inf), count - len(chosen))
    return Picked(torch.cat([chosen, rest]).sort().values)


@selector
def holov(picture: Picture, count: int, crops: int = 16, weight: float = 0.09) -> Picked:
    """HoloV (arXiv 2510.02912): each crop gets a quota by attention and by how unlike its tokens are.

    Crops are consecutive ranges of the sequence, as equal as can be, first ones longer. With a the class token's
    attention in the layer before the last and v the variance of a token's cosines within its crop (of embeddings
    behind the projector), scaled so that both have one mean, a crop's weight is the mean of a + ``weight`` * v, and
    its quota its share of the count, what is left over going one each to the heaviest. Inside a crop the most
    attended stay, in falling attention; a crop whose quota exceeds it stays as it is, and what it could not give
    becomes rows of zeros at the end, as in the published code, in the places of the first tokens that are not kept.
    The paper's temperature and its fetching again are not in that code. Without a class token: the mean attention
    received.
    """
    tokens = len(picture.embeds)
    attention = salience(picture, penultimate(picture.depth))
    index = torch.arange(tokens, device=attention.device)
    areas = [one for one in index.tensor_split(crops) if len(one)]
    scores = torch.stack([_crop_score(picture.embeds[one], attention[one], weight) for one in areas])
    shares = scores / (scores.sum() + 1e-6)
    quotas = (shares * count).floor().long()
    quotas[top(shares, count - int(quotas.sum()))] += 1
    given = [
        area if quota >= len(area) else area[top(attention[area], quota)]
        for area, quota in zip(areas, quotas.tolist(), strict=True)
    ]
    kept = torch.cat(given)
    missing = count - len(kept)
    if not missing:
        return Picked(kept)
    rows = picture.embeds[kept]
    kept = torch.cat([kept, without(tokens, kept)[:missing]])
    return Picked(kept, embeds=torch.cat([rows, rows.new_zeros(missing, rows.shape[1])]))


@selector
def two_cuts(picture: Picture, count: int | None = None) -> Picked:
    """The first of two cuts of arXiv 2409.01162: tokens before the knee of the sorted similarity to the class token.

    Paper only, and only its abstract was at hand: it cuts at the inflection point of the curve of similarities. Guessed
    here: similarity is the cosine of what the projector reads, the curve falls, and its knee is where it lies farthest
    below the straight line from its first to its last value, that token included; a curve nowhere below the line has
    no knee and keeps everything. Without a class token the curve is that of the mean attention received in the layer
    before the last. The second cut, by text in the language model, is not chosen here.

    Args:
        count: how many of the most similar stay in place of the knee.
    """
    tokens = len(picture.embeds)
    if picture.features is not None and len(picture.features) > tokens:
        like = unit(picture.features)
        similarity = like[-tokens:] @ like[0]
    else:
        similarity = salience(picture, penultimate(picture.depth))
    order = top(similarity, tokens)
    if count is None:
        count = _knee(similarity[order])
    return Picked(order[:count].sort().values)


def _once(indices: Tensor) -> Tensor:
    """``indices`` without repetition, in order of first appearance."""
    return torch.tensor(list(dict.fromkeys(indices.tolist())), dtype=indices.dtype, device=indices.device)


def _crop_score(embeds: Tensor, attention: Tensor, weight: float) -> Tensor:
    """A crop's mean score; a crop of one token has its attention, unscaled, as in the published code."""
    number = len(embeds)
    if number == 1:
        return attention.mean()
    like = wide(embeds)
    like = like / (like.norm(dim=1, keepdim=True) + 1e-6)
    cosines = (like @ like.T).fill_diagonal_(0)
    mean = cosines.sum(1) / (number - 1)
    variance = (cosines - mean[:, None]).square().sum(1) / (number - 1)
    scaled = attention * 1e3
    return (scaled + weight * variance * (scaled.abs().mean() / (variance.abs().mean() + 1e-6))).mean()


def _knee(falling: Tensor) -> int:
    """How many values stand up to the point farthest below the line from the first value to the last."""
    line = torch.linspace(0, 1, len(falling), dtype=falling.dtype, device=falling.device)
    below = falling[0] + line * (falling[-1] - falling[0]) - falling
    # rounding alone is no knee
    if below.max() <= 1e-6 * (falling[0] - falling[-1]):
        return len(falling)
    return int(below.argmax()) + 1
