"""Masks of the rows that run, and values as muted readers find them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from vtwcli.runtime.cache import Columns
from vtwcli.runtime.contract import PruningError, attention_kind, strange
from vtwcli.runtime.places import near
from vtwcli.runtime.plan import PlannedAction
from vtwcli.runtime.rows import FIRST_HALF, TEXT, Rows, Tensor


def _muted_pairs(
    muted: list[PlannedAction], reader: Tensor, kind: Tensor, places: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Which columns [B, T] of ``kind`` are muted for which rows [B, Q] of kind ``reader``, and which are read although
    they come later: [B, Q, T] each; ``places`` are those of rows and columns."""
    pairs = torch.zeros(*reader.shape, kind.shape[1], dtype=torch.bool, device=kind.device)
    opened = torch.zeros_like(pairs)
    for action in muted:
        both = concerned_rows(action, reader)[:, :, None] & muted_columns(action, kind)[:, None, :]
        if action.columns == "beyond" and places is not None:
            around = near(*places, action.steps)
            opened |= both & around & action.both_ways
            both &= ~around
        pairs |= both
    return pairs, opened & ~pairs


def concerned_rows(action: PlannedAction, kind: Tensor) -> Tensor:
    """Which rows of ``kind`` an action concerns."""
    if action.readers == "all":
        return torch.ones_like(kind, dtype=torch.bool)
    return (kind == TEXT) if action.readers == "text" else (kind != TEXT)


def muted_columns(action: PlannedAction, kind: Tensor) -> Tensor:
    """Which columns of ``kind`` an action mutes."""
    return kind == FIRST_HALF if action.columns == "first_half" else kind != TEXT


def sunk(values: Tensor, columns: Columns, sinks: list[PlannedAction]) -> Tensor:
    """Values [B, H_kv, T, D] as readers under ``sinks`` find them.

    Attention is linear in the values: setting a column's value to zero sets its weight to zero after the softmax,
    and giving it the first visual token's value moves its weight onto that token. Where actions overlap, the last
    one counts.
    """
    if not sinks:
        return values
    kind = columns.kind.to(values.device)
    visual = (kind != TEXT) & (columns.position >= 0).to(values.device)
    first = visual.int().argmax(1)
    out = values
    for action in sinks:
        muted = (muted_columns(action, kind) & visual)[:, None, :, None]
        if action.sink == "zero":
            out = out.masked_fill(muted, 0)
        else:
            index = first[:, None, None, None].expand(-1, values.shape[1], 1, values.shape[3])
            out = torch.where(muted, values.gather(2, index), out)
    return out


def check_mask(given: Any, shape: tuple[int, int], past: int, real: Tensor | None, attention: Any) -> None:
    """Refuse a mask of the model whose form is not known: it must say who may read whom as ``gathered`` expects.

    Args:
        given: what the model made; None: causal.
        shape: (B, S) of the chunk.
        past: tokens seen before it.
        real: which of its tokens are not padding, [B, S]; None leaves out the look at the mask's values.
        attention: the module that gets it.

    Raises:
        PruningError: a mask of a form that is not known.
    """
    if given is None:
        if shape[1] > 1 and not getattr(attention, "is_causal", True):  # one token alone reads all before it
            raise strange("the layers get no attention_mask, but do not read causally")
        return
    if not isinstance(given, torch.Tensor):
        raise strange(f"the layers get an attention_mask of the kind {type(given).__name__}")
    size, (batch, length), total = list(given.shape), shape, past + shape[1]
    if given.ndim == 2 and "flash" in attention_kind(attention) and size[0] == batch and size[1] <= total:
        return
    names = ("sliding_window", "attention_chunk_size")
    windows = (getattr(x, n, None) for x in (attention, getattr(attention, "config", None)) for n in names)
    window = next((w for w in windows if isinstance(w, int)), None)
    widths = (total, min(total, window - 1 + length)) if window else (total,)
    if given.ndim != 4 or size[0] not in (1, batch) or size[2] != length or size[3] not in widths:
        raise PruningError(
            f"a mask of shape {size} for {length} tokens behind {past} is not supported under a schedule; "
            "give [B, S], or [B, 1, S, T] of all T tokens"
        )
    if given.dtype != torch.bool and not given.is_floating_point():
        raise strange(f"the layers get an attention_mask of {given.dtype}, neither boolean nor additive")
    if real is None:
        return
    # what each token reads of its own chunk
    chunk = given[..., -length:] if size[3] >= length else given
    read = chunk if chunk.dtype == torch.bool else chunk > torch.finfo(chunk.dtype).min
    real = real.to(given.device)
    read = read & real[:, None, :, None] & real[:, None, None, :]
    itself = read.diagonal(dim1=2, dim2=3)
    backward, forward = read.tril(-1).sum((2, 3)), read.triu(1).sum((2, 3))
    positive = chunk.is_floating_point() and bool((chunk > 0).any())
    if positive or not bool((itself | ~real[:, None]).all() & (backward >= forward).all()):
        raise strange("the layers get an attention_mask that does not mask causally")


def gathered(
    given: Tensor | None,
    rows: Rows,
    index: Tensor,
    reader: Tensor,
    columns: Columns,
    past: int,
    length: int,
    muted: list[PlannedAction],
    like: Tensor,
    places: Tensor | None = None,
) -> Tensor | None:
    """The mask [B, 1 or H, Q, T] for ``rows`` reading ``columns``, out of the one the model made; None: causal.

    Args:
        given: the model's, see ``check_mask``.
        index: the token of each row, [B, Q].
        reader: its kind, [B, Q].
        past: tokens seen before the chunk.
        length: of the chunk.
        muted: actions that act before the softmax.
        like: of the device and dtype wanted; boolean or additive.
        places: of the chunk's tokens, where actions look around, [B, S, 3].
    """
    device = like.device
    tall, wide = rows.query.shape[1], columns.position.shape[1]
    plain = given is None and not (columns.ragged or rows.ragged or muted or like.is_floating_point())
    if plain and tall in (1, wide):
        return None  # causal, as the model meant it
    batch, position = len(index), columns.position.to(device)
    query = rows.query.to(device)[:, None, :, None]
    bias: Tensor | None = None
    allowed = (position >= 0)[:, None, None, :].expand(batch, 1, tall, wide)
    opened = None
    if muted:
        two = None
        if places is not None:
            at, here = (position - past).clamp(min=0), places.to(device)
            ours = here.gather(1, at[:, :, None].expand(-1, -1, 3)).masked_fill(
                (position < past)[:, :, None], -1
            )
            two = here.gather(1, index[:, :, None].expand(-1, -1, 3)), ours
        closed, opened = _muted_pairs(muted, reader, columns.kind.to(device), two)
        allowed = allowed & ~closed[:, None]
    if given is None:
        allowed = allowed & (position[:, None, None, :] <= (index + past)[:, None, :, None])
    else:
        first = past + length - given.shape[-1]  # sliding layers mask their last columns only
        place = position - first
        every = torch.arange(batch, device=device)[:, None, None]
        source = given.to(device).expand(batch, *given.shape[1:])
        taken = source[every, :, index[:, :, None], place.clamp(min=0)[:, None, :]].permute(0, 3, 1, 2)
        if taken.is_floating_point():
            read = taken > torch.finfo(taken.dtype).min
            bias = taken.masked_fill(~read, 0)
        else:
            read = taken.bool()
        allowed = allowed & (place >= 0)[:, None, None, :] & read
    if opened is not None:
        allowed = allowed | opened[:, None]
    allowed = allowed | ~query  # nobody reads a filler, so it may read anything
    if muted or rows.lonely:  # a row with nothing left to read reads itself
        itself = torch.eye(tall, wide, dtype=torch.bool, device=device).roll(wide - tall, dims=1)
        allowed = allowed | (itself & ~allowed.any(-1, keepdim=True))
    if not like.is_floating_point():
        return allowed
    lowest = torch.finfo(like.dtype).min
    mask = torch.zeros_like(allowed, dtype=like.dtype) if bias is None else bias.to(like.dtype)
    return mask.masked_fill(~allowed, lowest)


def additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to the scores of attention so that only ``allowed`` columns are read, of the same shape."""
    return torch.zeros_like(allowed, dtype=dtype).masked_fill_(~allowed, torch.finfo(dtype).min)


def rows_mask(
    given: Tensor | None, rows: Rows, columns: Columns, past: int, length: int, like: Tensor
) -> Tensor:
    """What is added to the scores of some ``rows`` reading ``columns``, [B, 1 or H, Q, T], without any mute.

    Args:
        given: the model's mask; one of two dimensions is flash attention's.
        past: tokens seen before the chunk.
        length: of the chunk.
        like: of the device and floating type wanted.
    """
    index, flat = rows.index, given is not None and given.ndim == 2
    assert index is not None
    full, like = None if flat else given, like.new_empty(0)
    mask = gathered(full, rows, index, torch.zeros_like(index), columns, past, length, [], like)
    assert mask is not None
    if flat:
        assert given is not None
        place = columns.position.to(like.device) - (past + length - given.shape[1])
        read = given.to(like.device).gather(1, place.clamp(min=0)).bool() & (place >= 0)
        mask = mask.masked_fill(~read[:, None, None, :], torch.finfo(mask.dtype).min)
    return mask


def flash_mask(
    given: Tensor | None,
    rows: Rows,
    columns: Columns,
    total: int,
    muted: list[PlannedAction],
    window: int | None,
) -> Tensor | None:
    """The two-dimensional mask [B, T] that flash attention wants for ``columns``, of ``total`` tokens seen."""
    if muted or rows.lonely or (given is not None and given.ndim != 2) or total > (window or math.inf):
        raise PruningError(
            "flash attention cannot mask visual readers or half of the visual columns, end a prompt with an image, "
            "take a mask of four dimensions or a sliding window under a schedule; use sdpa"
        )
    position = columns.position
    if given is None:
        return (position >= 0).long() if columns.ragged else None
    place = position.to(given.device) - (total - given.shape[-1])
    return given.gather(1, place.clamp(min=0)) * (place >= 0).to(given.dtype)


def split_sinks(sinks: list[PlannedAction]) -> tuple[list[PlannedAction], list[PlannedAction]]:
    """The actions on text rows and those on visual rows."""
    return [a for a in sinks if a.readers != "visual"], [a for a in sinks if a.readers != "text"]


def not_padding(mask: Any, ids: Tensor, first: bool = False) -> Tensor | None:
    """Which tokens of the chunk are real [B, S], from a 2-D mask or, in a 4-D one, from somebody reading them.

    Args:
        mask: or several by kind of layer.
        ids: of the chunk.
        first: whether the chunk's columns are the mask's first, as in a static cache; else its last.
    """
    if isinstance(mask, Mapping):
        mask = next((one for one in mask.values() if one is not None), None)
    if not isinstance(mask, torch.Tensor):
        return None
    if mask.ndim == 4:
        read = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min
        mask = read.any(2).any(1)
    mask = mask[:, : ids.shape[1]] if first else mask[:, -ids.shape[1] :]
    return mask.bool().to(ids.device).expand(ids.shape)
