"""What is published for one depth, read for another."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from vtwcli.schedule.schedule import Freeze, Mute
from vtwcli.schedule.short import layers_in, spans


def _layers(value: Any) -> Any:
    """``layers_in``, where there is text to read; the rest is for the type to judge, item by item."""
    parts = value if isinstance(value, Sequence) else ()
    return layers_in(value) if any(isinstance(part, str) for part in parts) else value


Layers = Annotated[tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(_layers)]
"""A parameter: a list of layers, or a text like ``"0-5, 9"``."""


def layer_of(layer: int, depth: int, published: int = 32) -> int:
    """The layer, of ``depth``, that lies where ``layer`` of ``published`` lies."""
    return round(layer * depth / published)


def counterpart(layer: int, depth: int, published: int = 32) -> int:
    """The layer of a published model whose place a ``layer`` of ``depth`` has: the one at its middle."""
    return (2 * layer + 1) * published // (2 * depth)


def scaled(layers: Iterable[int], depth: int, published: int = 32) -> tuple[int, ...]:
    """Those of ``depth`` layers whose counterparts are among ``layers``, as these are ordered."""
    order = {layer: place for place, layer in enumerate(layers)}
    mine = [d for d in range(depth) if counterpart(d, depth, published) in order]
    return tuple(sorted(mine, key=lambda d: (order[counterpart(d, depth, published)], d)))


def frozen(layers: Iterable[int]) -> list[Freeze]:
    """The actions that freeze these layers."""
    return [Freeze(at=at, until=until, action="freeze") for at, until in spans(layers)]


def in_order(actions: Sequence[Freeze | Mute]) -> tuple[Freeze | Mute, ...]:
    """Actions by their first layers; of equal ones in the order given."""
    return tuple(sorted(actions, key=lambda one: one.at))
