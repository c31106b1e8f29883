"""Which of a chunk's tokens have a row, and gathering what has one entry per row."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from vtwcli.runtime.contract import POSITIONS, attention_kind, strange

Tensor = torch.Tensor

# kinds of tokens; other visual tokens than those of the first half of a prompt's are 1
TEXT, FIRST_HALF = 0, 2


@dataclass(eq=False)
class Rows:
    """Which of a chunk's tokens have a row in the hidden states.

    Attributes:
        index: token of each row, [B, T]; right-aligned. None: all tokens, in place.
        query: the row is a token's, not a filler, [B, T].
        key: others may read the row, [B, T].
        ragged: whether some row is a filler or may not be read.
        lonely: whether some token has a row that others may not read.
        moved: where rows were merged: a ``merge.Recycled``.
        gone: tokens whose positions those behind them have taken over, [B, S]; None: positions are as they were.
    """

    index: Tensor | None
    query: Tensor
    key: Tensor
    ragged: bool = False
    lonely: bool = False
    gone: Tensor | None = None
    moved: Any = None


def compact(stay: Tensor, readable: Tensor | None = None) -> Rows:
    """Rows for the tokens that ``stay`` [B, S]; T is the largest number of them in any batch row, at least 1."""
    length = max(int(stay.sum(1).max()), 1)
    index = stay.int().argsort(dim=1, stable=True)[:, -length:]
    query = stay.gather(1, index)
    key = query if readable is None else (stay & readable).gather(1, index)
    ragged = not bool(key.all())
    return Rows(index, query, key, ragged, ragged and key is not query and bool((query & ~key).any()))


@dataclass(eq=False)
class Split:
    """The rows of a layer that does not update visual ones: some only have keys and values, the others run.

    Attributes:
        read, run: the parts' tokens, [B, V] and [B, T]; the last token's row runs whatever its kind.
        read_at, run_at: where they lie among the layer's rows.
        written: which of the rows that run are updated, [B, T].
        joined: the layer's entries in the order in which it gets them, first those of ``read``.
    """

    read: Rows
    run: Rows
    read_at: Tensor
    run_at: Tensor
    written: Tensor
    joined: Rows


def split(rows: Rows, index: Tensor, visual: Tensor, last: Tensor) -> Split:
    """Part ``rows``, which are those of the tokens ``index``, into ``visual`` ones and others, all [B, T].

    Args:
        last: the rows of last tokens, which run in any case.
    """
    query, key = rows.query.to(index.device), rows.key.to(index.device)
    text = query & ~visual
    read, run = compact(query & key & visual & ~last), compact(text | (query & last), key)
    read_at, run_at = read.index, run.index
    assert read_at is not None and run_at is not None
    joined = Rows(
        index.gather(1, torch.cat([read_at, run_at], 1)),
        torch.cat([read.query, run.query], 1),
        torch.cat([read.key, run.key], 1),
        read.ragged or run.ragged,
        gone=rows.gone,
    )
    read, run = (replace(part, index=index.gather(1, at)) for part, at in ((read, read_at), (run, run_at)))
    return Split(read, run, read_at, run_at, text.gather(1, run_at), joined)


def take(x: Tensor, index: Tensor | None, dim: int, batch: int = 0) -> Tensor:
    """Gather ``index`` [B, T] along ``dim`` of ``x``, whose dimension ``batch`` has size B or 1; None: all."""
    if index is None:
        return x
    if index.shape[0] == 1 and x.shape[batch] == 1:
        return x.index_select(dim, index[0].to(x.device))
    sizes, shape = list(x.shape), [1] * x.ndim
    sizes[batch], shape[batch], shape[dim] = index.shape[0], *index.shape
    x, sizes[dim] = x.expand(sizes), index.shape[1]
    return x.gather(dim, index.to(x.device).view(shape).expand(sizes))


def take_positions(
    given: dict[str, Any], index: Tensor, length: int, attention: Any, by_row: Iterable[str] = ()
) -> None:
    """Gather all that tells rows their positions, in the arguments ``given`` for ``length`` rows, and those arguments
    that are ``by_row``, [B, S, ...]."""
    for name in by_row:
        given[name] = take(given[name], index, 1)
    names = [name for name in given if name.startswith(POSITIONS)]
    if not names:
        raise strange(f"the layers get no {POSITIONS}")
    for name in names:
        if given[name] is not None:
            given[name] = _take_position(name, given[name], index, length)
        elif not _without_rotary(attention):
            raise strange(f"the layers get no {name}")
    ids = given.get("position_ids")
    if ids is not None:
        if ids.ndim < 2 or ids.shape[-1] != length or ids.shape[-2] not in (1, index.shape[0]):
            raise strange(f"the layers get position_ids of shape {list(ids.shape)} for {length} rows")
        # flash attention would take a gap for the border between packed sequences, so it gets none
        taken = None if "flash" in attention_kind(attention) else take(ids, index, ids.ndim - 1, ids.ndim - 2)
        given["position_ids"] = taken


def _without_rotary(attention: Any) -> bool:
    """Whether a layer has no rotary embeddings, as its config says in one of the library's ways, and is given None."""
    config, layer = getattr(attention, "config", None), getattr(attention, "layer_idx", None)
    if getattr(config, "position_embedding_type", "rope") == "nope":
        return True
    angles = getattr(config, "layer_rope_theta", None)
    if angles is not None and layer is not None:
        return not angles[layer]
    kinds, rope = getattr(config, "layer_types", None), getattr(config, "rope_parameters", None)
    if not kinds or layer is None or not isinstance(rope, dict):
        return False
    return kinds[layer] in rope and rope[kinds[layer]] is None


def _take_position(name: str, x: Any, index: Tensor, length: int) -> Any:
    """Gather rows of rotary embeddings [B or 1, S, D], with an axis for time, row and column [3, B or 1, S, D] before
    them where these are merged later, or tuples of them."""
    if isinstance(x, tuple | list):
        return tuple(_take_position(name, part, index, length) for part in x)
    fits = isinstance(x, torch.Tensor) and x.ndim in (3, 4) and x.shape[-2] == length
    if not fits or x.shape[-3] not in (1, index.shape[0]):
        shape = list(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__
        raise strange(f"the layers get {name} of {shape}, not [B, S, D] with {length} rows")
    return take(x, index, x.ndim - 2, x.ndim - 3)
