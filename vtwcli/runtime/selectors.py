"""Which rules choose visual tokens in front of the language model, and what each reads of the vision tower."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from vtwcli.runtime.select_diverse import cdpruner, divprune, prunesid, vispruner
from vtwcli.runtime.select_merging import prumerge, prumerge_plus, visionzip, vscan
from vtwcli.runtime.select_parts import Rule, penultimate, scaled
from vtwcli.runtime.select_salient import hiprune, holov, two_cuts

Layers = Callable[[int], tuple[int, ...]]


def _none(depth: int) -> tuple[int, ...]:
    return ()


def _last_but_one(depth: int) -> tuple[int, ...]:
    return (penultimate(depth),)


def _last(depth: int) -> tuple[int, ...]:
    return (depth - 1,)


class Selector(NamedTuple):
    """A rule and what its ``Picture`` must hold.

    Attributes:
        rule: chooses; called with a picture, a count and parameters.
        attention: layers, for a tower's depth, whose ``cls`` (or ``received`` where there is none) it reads.
        received: layers whose ``received`` it reads.
        keys: layers whose ``keys`` and ``queries`` it reads, where a token is a patch.
        features: it reads, and may replace, what the projector reads, where a token is a patch.
        counts: it can find the count itself: the count may be None.
    """

    rule: Rule
    attention: Layers = _last_but_one
    received: Layers = _none
    keys: Layers = _none
    features: bool = False
    counts: bool = False


SELECTORS: dict[str, Selector] = {
    "visionzip": Selector(visionzip, keys=_last_but_one, features=True),
    "prumerge": Selector(prumerge, _last, keys=_last, features=True, counts=True),
    "prumerge_plus": Selector(prumerge_plus, _last, keys=_last, features=True, counts=True),
    "divprune": Selector(divprune, _none),
    "cdpruner": Selector(cdpruner, _none),
    "hiprune": Selector(hiprune, _none, received=lambda depth: (scaled(8, depth), penultimate(depth))),
    "vscan": Selector(vscan, lambda depth: (scaled(5, depth), penultimate(depth))),
    "holov": Selector(holov),
    "prunesid": Selector(prunesid, features=True),
    "vispruner": Selector(vispruner, features=True),
    "two_cuts": Selector(two_cuts, features=True, counts=True),
}
