"""Rules that choose tokens by the class token's attention and merge others into them: VisionZip, PruMerge, VScan."""

from __future__ import annotations

import torch

from vtwcli.runtime.picture import Picked, Picture
from vtwcli.runtime.rows import Tensor
from vtwcli.runtime.select_parts import (
    answer,
    penultimate,
    salience,
    scaled,
    selector,
    source,
    top,
    unit,
    wide,
    windows,
    without,
)  # fmt: skip


@selector
def visionzip(picture: Picture, count: int, contextual: int | None = None) -> Picked:
    """VisionZip (arXiv 2412.04467): what the class token attends to, and the rest merged into evenly spaced targets.

    Dominant rows: the class token itself and the patches that it attends to most in the layer before the last.
    Contextual rows: of the other patches every n-th is a target; each remaining patch goes to the target whose key is
    most similar, and a target's row is its feature plus the mean of those that came to it. ``count`` is the number of
    all rows. The class token's row stands in the place of the first token that is neither kept nor a target. Without
    a class token all dominant rows are patches; where a token is not one patch, rows of the language model's input
    take the place of features and of keys.

    Args:
        contextual: number of contextual rows; by default the published 10 of 64.
    """
    tokens, layer = len(picture.embeds), penultimate(picture.depth)
    rows, lead, behind = source(picture)
    targeted = min(round(count * 10 / 64) if contextual is None else contextual, count)
    lead = lead[: count - targeted]
    dominant = top(salience(picture, layer), count - targeted - len(lead)).sort().values
    others = without(tokens, dominant)
    targets = others[:: max(1, len(others) // targeted)][:targeted] if targeted else others[:0]
    remaining = without(tokens, dominant, targets)
    metric = unit(wide(picture.keys[layer]).mean(1)[-tokens:]) if layer in picture.keys else unit(rows)
    merged = wide(rows)[targets]
    if targeted:
        merged = merged + _means(metric, wide(rows), remaining, targets)
    kept = torch.cat([remaining[: len(lead)], dominant, targets])
    return answer(kept, torch.cat([wide(lead), wide(rows)[dominant], merged]), rows, behind)


@selector
def prumerge(picture: Picture, count: int | None = None, neighbours: int = 32) -> Picked:
    """PruMerge (arXiv 2403.15388): outliers of the last layer's class attention, each with its neighbours added.

    How many stay is found: as many as have an attention above the third quartile plus 1.5 times the distance of the
    quartiles, at least one. Each kept patch's feature takes in those of its neighbours by the cosine of keys, kept
    ones included, weighted by their attention; one more row holds the weighted sum of all that are not kept. Rows
    stand in falling attention, the extra row last, in the place of the first token that is not kept. Attention is that
    of the class token's query over all keys with heads concatenated. Without a class token: the mean attention
    received; where a token is not one patch, rows of the language model's input take the place of features and keys.

    Args:
        count: number of rows in place of what is found, the extra one included.
        neighbours: K of the nearest, whatever the number of tokens.
    """
    weights = _class_weights(picture)
    share = _outliers(weights) if count is None else (count - 1) / len(weights)
    number = max(1, int(len(weights) * share)) if count is None else count - 1
    return _gathered(picture, weights, top(weights, number), neighbours)


@selector
def prumerge_plus(picture: Picture, count: int | None = None, neighbours: int = 32) -> Picked:
    """PruMerge+: as ``prumerge``, with evenly spaced tokens beside the outliers, about three for each.

    They are every n-th token, n = int(int(1 / share) / 3) with the outliers' share, at least 1 (the published code
    fails above a third); those not already chosen stand behind the outliers.

    Args:
        count: number of rows at most, the extra one included, in place of what is found: a quarter by attention.
        neighbours: as for ``prumerge``.
    """
    weights = _class_weights(picture)
    tokens = len(weights)
    share = _outliers(weights) if count is None else max((count - 1) / 4 / tokens, 1 / tokens)
    chosen = top(weights, max(1, int(tokens * share)))
    step = max(1, int(int(1 / max(share, 1 / tokens)) / 3))
    even = torch.arange(0, tokens - 1, step, device=weights.device)
    chosen = torch.cat([chosen, even[~torch.isin(even, chosen)]])
    return _gathered(picture, weights, chosen if count is None else chosen[: count - 1], neighbours)


@selector
def vscan(picture: Picture, count: int, side: int = 4) -> Picked:
    """VScan's choice in front of the language model (arXiv 2505.22654): local and global scan, the others merged.

    Half of ``count`` is shared equally by ``side`` x ``side`` windows of the grid, by the class token's attention in
    an early layer (5 of 24); the rest are the largest in the layer before the last without those. Each other token
    joins the kept one with the most similar embedding behind the projector, as a plain mean. A half that does not
    divide by the number of windows keeps fewer, as in the published code. Windows grow with the grid; without a
    single grid they are consecutive ranges. Without a class token: the mean attention received.
    """
    tokens, areas = len(picture.embeds), windows(picture, side)
    near, far = (salience(picture, at) for at in (scaled(5, picture.depth), penultimate(picture.depth)))
    quota = count // 2 // len(areas)
    local = torch.cat([area[top(near[area], quota)] for area in areas])
    far = far.index_fill(0, local, -torch.inf)
    kept = torch.cat([local, top(far, count - count // 2)]).unique()
    rest, rows, like = without(tokens, kept), wide(picture.embeds), unit(picture.embeds)
    joined = _joined(like, rest, kept)
    merged = (rows[kept] + joined.T @ rows[rest]) / (1 + joined.sum(0))[:, None]
    return answer(kept, merged, picture.embeds, behind=True)


def _joined(metric: Tensor, rest: Tensor, kept: Tensor) -> Tensor:
    """One where a token of ``rest`` has its largest product with a token of ``kept``, [R, n]."""
    nearest = (metric[rest] @ metric[kept].T).argmax(1)
    return torch.nn.functional.one_hot(nearest, len(kept)).to(metric.dtype)


def _means(metric: Tensor, rows: Tensor, rest: Tensor, kept: Tensor) -> Tensor:
    """Mean over the tokens that join each of ``kept``, [n, C]; zeros where none does."""
    joined = _joined(metric, rest, kept).to(rows.dtype)
    return joined.T @ rows[rest] / joined.sum(0).clamp(min=1)[:, None]


def _class_weights(picture: Picture) -> Tensor:
    """The last layer's attention of the class token on the patches, heads concatenated, [N]."""
    last, tokens = picture.depth - 1, len(picture.embeds)
    if last not in picture.queries or len(picture.queries[last]) == tokens:
        return salience(picture, last)
    query, keys = (wide(of[last]).flatten(1) for of in (picture.queries, picture.keys))
    return (query[0] @ keys.T * keys.shape[1] ** -0.5).softmax(-1)[-tokens:]


def _outliers(weights: Tensor) -> float:
    """Share of the weights that are outliers by the distance of the quartiles."""
    weights = weights.cpu().double()  # not every device has double precision
    low, high = weights.quantile(torch.tensor([0.25, 0.75], dtype=torch.float64))
    return int((weights > high + 1.5 * (high - low)).sum()) / len(weights)


def _gathered(picture: Picture, weights: Tensor, chosen: Tensor, neighbours: int) -> Picked:
    """The chosen with their neighbours' weighted features, and a row with those of all others."""
    rows, _, behind = source(picture)
    tokens, last, x = len(weights), picture.depth - 1, wide(rows)
    keys = unit(picture.keys[last].flatten(1)[-tokens:] if last in picture.keys else rows)
    alike = keys[chosen] @ keys.T
    alike[torch.arange(len(chosen), device=chosen.device), chosen] = -torch.inf
    near = alike.argsort(dim=1, descending=True, stable=True)[:, : min(neighbours, tokens - 1)]
    made = x[chosen] + (weights[near][..., None] * x[near]).sum(1)
    rest = without(tokens, chosen)
    if len(rest):
        made = torch.cat([made, (weights[rest] @ x[rest])[None]])
    return answer(torch.cat([chosen, rest[:1]]), made, rows, behind)
