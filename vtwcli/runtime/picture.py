"""What methods that choose visual tokens in front of the language model see of an image, and what they answer.

How to add a selector: write ``def NAME(picture: Picture, count: int, **parameters) -> Picked`` as a pure function, and
give its score three rows: the word with its sentence in ``words.WORDS`` (``_tower("tower_NAME", "...")``), its
parameters with their bounds in ``rules.KEYS`` under that word, and in ``selection.SELECTORS`` the function with what it
needs, ``"tower_NAME": Selector(NAME, lambda p: Needs(cls=(-2,), features=True))``, where ``p`` are the parameters.
Layers in ``Needs`` may count from the end; the function finds them in the picture with ``picture.depth + layer``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from vtwcli.runtime.rows import Tensor


class Picture(NamedTuple):
    """One image as the model sees it before its language model: N visual tokens, a grid's row by row.

    Attributes:
        embeds: rows of the language model's input, [N, E].
        question: the same of the text behind the images, [T, E].
        grid: rows and columns of tokens; None where the tokens have no single grid.
        cls: tower layer -> the class token's attention on the patches, [heads, N]; empty without a class token.
        received: tower layer -> attention that each patch receives, the mean over heads and all query rows, [N]; the
            mean over a token's patches where it has several.
        keys: tower layer -> what k_proj returns, bias included, [1 + N, heads, D], the class token first; only
            where a token is a patch.
        queries: the same of q_proj.
        features: what the projector reads, [1 + N, C], the class token first; only where a token is a patch.
        depth: number of tower layers. Keys of the mappings are layers counted from 0.
    """

    embeds: Tensor
    question: Tensor
    grid: tuple[int, int] | None
    cls: dict[int, Tensor]
    received: dict[int, Tensor]
    keys: dict[int, Tensor]
    queries: dict[int, Tensor]
    features: Tensor | None
    depth: int


class Picked(NamedTuple):
    """What a selector chose.

    Attributes:
        kept: indices of tokens, [n], in the order in which their rows stand.
        rows: features that replace the kept tokens' before the projector, [n, C]; None leaves them.
        embeds: rows that replace the kept tokens' behind the projector, [n, E]; None leaves them.
    """

    kept: Tensor
    rows: Tensor | None = None
    embeds: Tensor | None = None


class Needs(NamedTuple):
    """What a selector needs of a picture beside embeddings, question and grid; tower layers, from the end below 0.

    A layer that is a float is a share of the tower's depth, rounded. ``soft``: the selector has a substitute for what
    a family lacks. Without a class token what it asks of ``cls`` comes as ``received``; keys, queries and features
    are left out where a token is not one patch beside a class token.
    """

    cls: tuple[float, ...] = ()
    received: tuple[float, ...] = ()
    keys: tuple[float, ...] = ()
    queries: tuple[float, ...] = ()
    features: bool = False
    soft: bool = False


@dataclass(eq=False)
class Front:
    """What was chosen before the first layer, image by image.

    Attributes:
        stays: the visual tokens that do, [B, S].
        kept: the tokens that each of a sample's images keeps, counted within the image from 0, as their rows stand.
        left: the visual tokens that do not, whose places those behind them take over, [B, S]; None where the others
            keep their position ids.
    """

    stays: Tensor
    kept: list[list[list[int]]]
    left: Tensor | None
