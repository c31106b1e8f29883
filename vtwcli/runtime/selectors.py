"""The scores of the vision tower by their words: what each needs, and the function that chooses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from vtwcli.runtime.contract import PruningError
from vtwcli.runtime.picture import Needs, Picked, Picture
from vtwcli.runtime.rows import Tensor
from vtwcli.runtime.select_diverse import cdpruner, divprune, prunesid, vispruner
from vtwcli.runtime.select_merging import prumerge, prumerge_plus, visionzip, vscan
from vtwcli.runtime.select_salient import hiprune, holov, two_cuts


class Selector(NamedTuple):
    """How tokens are chosen under a score.

    Attributes:
        choose: the function; it gets a picture, the number of tokens, and the score's parameters.
        needs: what of the picture it looks at, given its parameters.
    """

    choose: Callable[..., Picked]
    needs: Callable[[Mapping[str, Any]], Needs]


def best(score: Tensor, count: int) -> Tensor:
    """The ``count`` best of [N] in their order; of equal ones the first."""
    return score.argsort(descending=True, stable=True)[:count].sort().values


def layers_between(first: int, last: int) -> tuple[int, ...]:
    """Layers ``first`` to ``last``; counted from the end both or neither, so that the order is known."""
    if (first < 0) != (last < 0) or last < first:
        raise PruningError(
            f"vision layers {first} to {last} are no range; count both from the start, or both from the end"
        )
    return tuple(range(first, last + 1))


def attended(picture: Picture, count: int, first: int, last: int) -> Picked:
    """The tokens with the largest sum over layers of the mean over heads of the class token's attention."""
    layers = layers_between(first, last)
    return Picked(best(sum_of(picture.cls[layer % picture.depth].mean(0) for layer in layers), count))


def received(picture: Picture, count: int, layer: int, per: str) -> Picked:
    """The tokens, or whole rows of the grid, that receive most attention in a layer."""
    score = picture.received[layer % picture.depth]
    if per == "token":
        return Picked(best(score, count))
    if picture.grid is None:
        raise PruningError("these images have no grid of tokens whose rows could be kept; choose tokens")
    rows, columns = picture.grid
    chosen = best(score.view(rows, columns).sum(1), min(max(count // columns, 1), rows))
    return Picked((chosen[:, None] * columns + torch.arange(columns, device=chosen.device)).flatten())


def sum_of(scores: Any) -> Tensor:
    """The sum of tensors, in their order."""
    return torch.stack(list(scores)).sum(0)


def _merging(parameters: Mapping[str, Any]) -> Needs:
    return Needs((-1,), keys=(-1,), queries=(-1,), features=True, soft=True)


def _attended_features(parameters: Mapping[str, Any]) -> Needs:
    return Needs((-2,), features=True, soft=True)


SELECTORS: dict[str, Selector] = {
    "tower_cls": Selector(attended, lambda p: Needs(cls=layers_between(p["first"], p["last"]))),
    "tower_received": Selector(received, lambda p: Needs(received=(p["layer"],))),
    "tower_visionzip": Selector(visionzip, lambda p: Needs((-2,), keys=(-2,), features=True, soft=True)),
    "tower_prumerge": Selector(prumerge, _merging),
    "tower_prumerge_plus": Selector(prumerge_plus, _merging),
    "tower_divprune": Selector(divprune, lambda p: Needs()),
    "tower_cdpruner": Selector(cdpruner, lambda p: Needs()),
    "tower_vispruner": Selector(vispruner, _attended_features),
    "tower_hiprune": Selector(hiprune, lambda p: Needs(received=(p["object_layer"] / 24, -2))),
    "tower_vscan": Selector(vscan, lambda p: Needs((5 / 24, -2), soft=True)),
    "tower_holov": Selector(holov, lambda p: Needs((-2,), soft=True)),
    "tower_prunesid": Selector(prunesid, _attended_features),
    "tower_two_cuts": Selector(two_cuts, _attended_features),
}
"""One row a score."""
