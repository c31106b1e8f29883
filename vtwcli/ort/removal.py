"""Which tokens go on where a schedule's action takes effect."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from vtwcli.schedule.words import kept_count

from .tokens import Tokens


def compact(keep: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each row's kept positions are, right-aligned.

    Args:
        keep: [B, S] bool.

    Returns:
        Indices [B, T] in rising order and their mask [B, T], bool; T is the largest number of any row, at least 1.
        Rows with fewer begin with masked places.
    """
    width = max(int(keep.sum(1).max()), 1)
    index = np.argsort(keep, 1, kind="stable")[:, keep.shape[1] - width :]
    return index, np.take_along_axis(keep, index, 1)


def remove(
    tokens: Tokens, removal: Mapping[str, Any], scores: np.ndarray | None
) -> tuple[np.ndarray, Tokens]:
    """Which tokens stay: all text, and of the visual ones those that a schedule's action keeps.

    Args:
        tokens: what there is.
        removal: the action, ``withdraw`` or ``keep``.
        scores: of each token [B, S], where the action needs them; None in a step without visual tokens.

    Returns:
        Their places [B, T] (see ``compact``), and the tokens that stay.
    """
    stay = tokens.attended & ~tokens.visual
    if removal["action"] == "keep" and tokens.visual.any():
        stay |= chosen(tokens.visual, removal["select"], scores)
    index, mask = compact(stay)
    rows = np.arange(len(index))[:, None]
    return index, Tokens(mask, tokens.visual[rows, index] & mask, tokens.positions[..., rows, index])


def parts(tokens: Tokens) -> tuple[np.ndarray, np.ndarray]:
    """Where text and visual tokens are, [B, T] and [B, V]; rows with fewer begin with the place of their last token."""
    found = []
    for which in (tokens.attended & ~tokens.visual, tokens.attended & tokens.visual):
        index, there = compact(which)
        found.append(np.where(there, index, tokens.last()[:, None]))
    return found[0], found[1]


def chosen(visual: np.ndarray, select: Mapping[str, Any], scores: np.ndarray | None) -> np.ndarray:
    """The visual tokens that ``keep`` keeps, bool [B, S].

    Of n tokens m stay, see ``kept_count``: ``uniform`` ones the ceil(i n / m)-th for i = 0..m-1, otherwise those
    with the highest scores, the earlier among equals.
    """
    number = visual.sum(1)
    wanted = np.array([kept_count(select, int(n)) for n in number])[:, None]
    if select["score"] == "uniform":
        ordinal = np.cumsum(visual, 1) - 1
        return visual & ((ordinal * wanted) % np.maximum(number, 1)[:, None] < wanted)
    assert scores is not None
    order = np.argsort(np.where(visual, -scores.astype(np.float64), np.inf), 1, kind="stable")
    rank = np.argsort(order, 1, kind="stable")
    return visual & (rank < wanted)
