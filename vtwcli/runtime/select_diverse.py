"""Rules that keep tokens unlike each other: DivPrune, CDPruner, VisPruner, PruneSID."""

from __future__ import annotations

import math

import torch

from vtwcli.runtime.picture import Picked, Picture
from vtwcli.runtime.rows import Tensor
from vtwcli.runtime.select_parts import penultimate, salience, selector, source, top, unit, wide, without


@selector
def divprune(picture: Picture, count: int) -> Picked:
    """DivPrune (arXiv 2503.02175): largest smallest cosine distance among the chosen, greedily, behind the projector.

    Kept rows stand in sequence order.
    """
    return Picked(farthest(picture.embeds, count).sort().values)


def farthest(rows: Tensor, count: int) -> Tensor:
    """DivPrune's picks in their order, [count].

    The first is the one farthest from its nearest other; then always the one whose nearest chosen is farthest.
    """
    like = unit(rows)
    distance = 1 - like @ like.T
    pick = int(distance.topk(2, dim=0, largest=False).values[1].argmax())
    picks, least = [pick], distance[pick].clone()
    for _ in range(count - 1):
        least[pick] = -torch.inf
        pick = int(least.argmax())
        picks.append(pick)
        least = torch.minimum(least, distance[pick])
    return torch.tensor(picks, device=rows.device)


@selector
def cdpruner(picture: Picture, count: int, relevance_weight: float = 0.5, negated: bool = False) -> Picked:
    """CDPruner (arXiv 2506.10967): greedy MAP of a determinantal process over tokens, weighted by the question.

    The kernel is diag(w) S diag(w) with S the cosines of embeddings behind the projector. Relevance is the cosine of
    an embedding and of the question's mean embedding, scaled to 0..1 over the image. The published code compares
    CLIP's image and text embeddings, negated; models carry no CLIP text tower, so this follows OpenVINO GenAI, which
    compares with the mean of the text's embeddings and weights by w = exp(a * relevance) with
    a = relevance_weight / (2 * (1 - relevance_weight)). Kept rows stand in sequence order.

    Args:
        relevance_weight: 0 is diversity alone; 1 takes the relevance itself as w, as CDPruner's code does.
        negated: take what is least like the question, as the published code does with CLIP's embeddings.
    """
    like = unit(picture.embeds)
    weights = _relevance(picture, like, negated)
    if relevance_weight < 1:
        weights = (relevance_weight / (2 * (1 - relevance_weight)) * weights).exp()
    # exactly 1 on the diagonal: rounding must not rank tokens of one weight
    kernel = weights[:, None] * (like @ like.T).fill_diagonal_(1) * weights
    return Picked(_greedy_map(kernel, count).sort().values)


@selector
def vispruner(picture: Picture, count: int, important: float = 0.5) -> Picked:
    """VisPruner (arXiv 2412.01818, ICCV 2025): half by the class token's attention, the other half without twins.

    ``important`` of the count are what the class token attends to most in the layer before the last. The others, in
    falling attention, are dealt in turn into two lists; the eight of the first list (fewer at the end) that are most
    similar to some token of the second leave, those that stay stand by falling similarity, then the second list, and
    so on until the count is met. Similarity is the cosine of what the projector reads. Kept rows stand in sequence
    order. Without a class token: the mean attention received.
    """
    order = salience(picture, penultimate(picture.depth)).argsort(descending=True, stable=True)
    sure = int(count * important)
    kept, residual, wanted = order[:sure], order[sure:], count - sure
    if wanted == 0:
        return Picked(kept.sort().values)
    like = unit(source(picture)[0])
    while len(residual) > wanted:
        first, second = residual[::2], residual[1::2]
        twins = (like[first] @ like[second].T).max(1).values
        leave = min(8, len(residual) - wanted)
        residual = torch.cat([first[twins.argsort(descending=True, stable=True)[leave:]], second])
    return Picked(torch.cat([kept, residual]).sort().values)


@selector
def prunesid(picture: Picture, count: int) -> Picked:
    """PruneSID (arXiv 2603.09480): groups of tokens by principal components, in each what suppression leaves.

    With T = ``count``: a token belongs to that of int(T / 4) principal components of the sigmoid of features (tokens
    are the variables) on which it loads most. In each group the largest class attention suppresses all whose cosine
    with it exceeds T / 32 times the image's mean cosine, and so on. Every group gives one token at least, at most
    5 * ceil(T / 64) (more where that does not suffice), the others in proportion to its survivors, survivors first.
    Row 0 is the class token's, in the place of the first token that is not kept; rows stand group by group. Without a
    class token all rows are patches, scored by the mean attention received.

    The published code takes torch.pca_lowrank, which is random; here the components are exact, so there is no seed.
    """
    tokens, rows = len(picture.embeds), source(picture)
    like = unit(rows[0])
    similarity = (like @ like.T).cpu()
    scores = salience(picture, penultimate(picture.depth)).cpu()
    component = _components(wide(rows[0]), max(1, count // 4)).cpu()
    pairs = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    limit = float(count / 32 * similarity[pairs].mean())
    groups = [(component == g).nonzero()[:, 0] for g in range(max(1, count // 4))]
    survivors = [_suppressed(similarity, scores, group, limit) for group in groups]
    lead = len(rows[1])
    quotas = _quotas([len(one) for one in groups], [len(one) for one in survivors], count, lead)
    chosen: list[int] = []
    for group, first, quota in zip(groups, survivors, quotas, strict=True):
        others = [int(i) for i in group[top(scores[group], len(group))] if int(i) not in first]
        chosen += [*first, *others][:quota]
    kept = torch.tensor(chosen[: count - lead], dtype=torch.long, device=picture.embeds.device)
    if not lead:
        return Picked(kept)
    kept = torch.cat([without(tokens, kept)[:1], kept])
    return Picked(kept, rows=torch.cat([rows[1], rows[0][kept[1:]]]))


def _relevance(picture: Picture, like: Tensor, negated: bool) -> Tensor:
    """Cosine of each token and of the question's mean embedding, scaled to 0..1, [N]; ones where all are equal."""
    if len(picture.question) == 0:
        return torch.ones_like(like[:, 0])
    found = like @ unit(wide(picture.question).mean(0))
    found = -found if negated else found
    spread = found.max() - found.min()
    return (found - found.min() + 1e-6) / spread if spread > 1e-6 else torch.ones_like(found)


def _greedy_map(kernel: Tensor, count: int) -> Tensor:
    """Indices whose determinant grows most, one after the other, by an incremental Cholesky factor.

    What is left of a token's own variance is held above a millionth of it, so that rounding decides nothing where
    the chosen already span it.
    """
    variance = kernel.diagonal().clone()
    floor = 1e-6 * variance
    factor, free, picks = (
        kernel.new_zeros(count, len(kernel)),
        torch.ones_like(variance, dtype=torch.bool),
        [],
    )
    for step in range(count):
        pick = int(torch.where(free, variance, -torch.inf).argmax())
        picks.append(pick)
        free[pick] = False
        found = (kernel[pick] - factor[:step, pick] @ factor[:step]) / variance[pick].sqrt()
        factor[step] = found
        variance = torch.maximum(variance - found.square(), floor)
    return torch.tensor(picks, device=kernel.device)


def _components(rows: Tensor, count: int) -> Tensor:
    """The component of largest loading of each token, [N]; ``count`` of them, or as many as there are."""
    matrix = rows.sigmoid().T
    matrix = matrix - matrix.mean(0)
    return torch.linalg.svd(matrix, full_matrices=False).Vh[:count].abs().argmax(0)


def _suppressed(similarity: Tensor, scores: Tensor, group: Tensor, limit: float) -> list[int]:
    """What is left of a group, in falling score, when each suppresses those after it that are too similar."""
    alive, found = scores[group].clone(), []
    while len(group) and alive.max() > 0:
        best = int(alive.argmax())
        found.append(int(group[best]))
        alive[similarity[group[best], group] > limit] = 0
        alive[best] = 0
    return found


def _quotas(sizes: list[int], survivors: list[int], count: int, lead: int) -> list[int]:
    """How many tokens each group gives, [G]; together ``count`` less ``lead``."""
    size, left = torch.tensor(sizes), torch.tensor(survivors)
    least = size.clamp(max=1)
    most = torch.minimum(size, left).clamp(max=5 * math.ceil(count / 64))
    while most.sum() < count:
        most = torch.minimum(most + 1, size)
    others = max(0, count - int(least.sum()) - lead)
    ends = ((left / left.sum().clamp(min=1)).cumsum(0) * others).round().long()
    found = torch.minimum(ends.diff(prepend=ends.new_zeros(1)) + least, most)
    for group in left.argsort(descending=True, stable=True):
        missing = others + int(least.sum()) - int(found.sum())
        if missing <= 0:
            break
        found[group] += min(int(most[group] - found[group]), missing)
    return [int(one) for one in found]
