"""The hook behind a layer's attention: what muted rows read, the last row's attention."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch

from vtwcli.runtime.call import Tap
from vtwcli.runtime.contract import (
    CACHE_NAMES,
    PruningError,
    attention_kind,
    cache_argument,
    given_cache,
    strange,
)
from vtwcli.runtime.masks import sunk
from vtwcli.runtime.rows import TEXT, Rows, Tensor, compact, take, take_positions
from vtwcli.runtime.scores import last_row_numbers, self_cross
from vtwcli.runtime.trimming import spread

_CHUNK_WEIGHTS = 1 << 24  # attention weights of some rows that are there at once


class _Fixed:
    """A cache of one layer whose entries are all there already."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.entries = (keys, values)
        self.asked = 0

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As a cache's; the new entries are among the old ones."""
        self.asked += 1
        return self.entries


not_compiled = torch.compiler.disable  # hooks decide by values, so under torch.compile they run as they are


@not_compiled
def leave_attention(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    """Run text rows again with the values their mutes leave them; look at the last row's attention."""
    tap = given_cache(kwargs)
    if not isinstance(tap, Tap):
        return output
    tap.due = False
    if tap.keys is None or tap.values is None:
        raise strange("the attention of this model does not hand its keys to the cache")
    given = dict(kwargs)
    if len(args) > 1:
        raise strange("the attention gets more than one positional argument")
    given["hidden_states"] = hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    if not isinstance(output, tuple) or output[0].shape != hidden.shape:
        raise strange(f"the attention of layer {tap.layer} does not return its rows first in a tuple")
    if tap.skips or tap.second is not None:
        rows, part = _text_again(module, given, tap)
        assert rows.index is not None
        # fillers go to a slot behind the last, which is cut off
        place = rows.index.masked_fill(~rows.query, hidden.shape[1])[:, :, None].expand_as(part)
        room = torch.cat([output[0], output[0].new_zeros(output[0].shape[0], 1, part.shape[2])], 1)
        output = (room.scatter(1, place, part)[:, :-1], *output[1:])
    if tap.probes:
        with torch.no_grad():
            tap.call.probe = _probe(module, given, tap)
    return output


def _text_again(module: Any, given: dict[str, Any], tap: Tap) -> tuple[Rows, Tensor]:
    """Run the attention for the text rows alone; returns where they are and their output [B, T', D]."""
    call, columns, device = tap.call, tap.columns, given["hidden_states"].device
    assert columns is not None and tap.keys is not None and tap.values is not None
    key = ("text", id(tap.rows), tap.skips)
    if key not in call.memo:
        text, tokens = (call.kinds(tap.rows, device) == TEXT) & tap.rows.query.to(device), tap.rows
        if (
            "flash" in attention_kind(module) and not tap.skips
        ):  # its causal alignment needs a row for each new entry
            here = Rows(torch.arange(text.shape[1], device=device).expand(text.shape), text, text)
        else:
            here = compact(text)
            assert here.index is not None
            tokens = replace(here, index=call.index(tap.rows, device).gather(1, here.index))
        call.memo[key] = here, tokens, tap.rows
    here, tokens, _ = call.memo[key]
    keys, values = tap.keys, sunk(tap.values, columns, tap.second or [])
    if tap.skips:
        memo = ("text columns", id(columns))
        if memo not in call.memo:
            only = compact((columns.position >= 0) & (columns.kind == TEXT))
            call.memo[memo] = only, columns.gather(only), columns
        only, columns, _ = call.memo[memo]
        keys, values = take(keys, only.index, 2), take(values, only.index, 2)
    muted = [] if tap.skips else call.plan.masks(tap.layer, prefill=True)
    mask = call.mask(tap.given, tokens, columns, tap.past, muted, given["hidden_states"], module)
    return here, _attend(module, given, here.index, mask, keys, values)[0]


def _probe(module: Any, given: dict[str, Any], tap: Tap) -> dict[str, Tensor]:
    """Scores of the chunk's tokens [B, S], from the last row of each sample."""
    call = tap.call
    if any(p.is_meta for p in module.parameters()):
        raise PruningError("scores and conditions do not go with weights offloaded to CPU or disk")
    assert tap.keys is not None and tap.values is not None
    last = call.last_row(tap.rows).to(given["hidden_states"].device)[:, None]
    mask = given.get("attention_mask")
    if mask is not None and mask.ndim == 2:
        mask = mask[:, None, None, :].bool()
    elif mask is not None:
        rows = torch.arange(len(last), device=mask.device)[:, None]
        mask = mask.expand(len(last), *mask.shape[1:])[rows, :, last.to(mask.device)].transpose(1, 2)
    if mask is not None and mask.dtype == torch.bool:
        like = given["hidden_states"]
        mask = torch.zeros_like(mask, dtype=like.dtype).masked_fill(~mask, torch.finfo(like.dtype).min)
    weights = row_weights(module, given, last, mask, tap.keys, tap.values)
    numbers = last_row_numbers(weights[:, :, 0], tap.values)
    if call.plan.needs_all(tap.layer):
        numbers["self_cross"] = _self_cross(module, given, tap)
    if call.visual is None:
        assert tap.columns is not None
        call.entry_numbers = spread(numbers, tap.columns, tap.past + call.shape[1])
        return {}
    batch, length = call.shape
    device = call.last.device
    wide = tap.keys.shape[2]
    if tap.columns is not None:
        position = tap.columns.position.to(device)
    else:
        total = tap.past + length
        position = torch.arange(total - wide, total, device=device).expand(batch, wide)
    # entries of earlier turns and fillers go to a slot behind the last, which is cut off
    place = (position - tap.past).masked_fill(position < tap.past, length)
    room = {name: x.new_zeros(batch, length + 1, device=device) for name, x in numbers.items()}
    return {name: room[name].scatter(1, place, x.to(device))[:, :length] for name, x in numbers.items()}


def _self_cross(module: Any, given: dict[str, Any], tap: Tap) -> Tensor:
    """The score ``self_cross`` of the columns [B, T], a chunk of rows at a time."""
    hidden, call = given["hidden_states"], tap.call
    assert tap.keys is not None and tap.values is not None
    (batch, tall), wide, device = hidden.shape[:2], tap.keys.shape[2], hidden.device
    kind = call.kinds(tap.rows, device)
    there = (tap.rows.query & tap.rows.key).to(device)  # a visual token that left may have the last row
    visual, text = there & (kind != TEXT), there & (kind == TEXT)
    mask = given.get("attention_mask")
    if mask is None or mask.ndim == 2:
        causal = torch.ones(tall, wide, dtype=torch.bool, device=device).tril(wide - tall)[None, None]
        mask = causal if mask is None else causal & mask[:, None, None, :].bool()
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=hidden.dtype).masked_fill(~mask, torch.finfo(hidden.dtype).min)
    step = max(1, _CHUNK_WEIGHTS // (batch * wide * getattr(module.config, "num_attention_heads", 1)))
    parts = [slice(at, min(at + step, tall)) for at in range(0, tall, step)]
    found = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
    for part in parts:
        index = torch.arange(part.start, part.stop, device=device).expand(batch, -1)
        weights = row_weights(module, given, index, mask[:, :, part], tap.keys, tap.values)
        found = found + self_cross(weights, visual[:, part], text[:, part])
    by_visual, by_text = found
    return by_visual / visual.sum(1, keepdim=True).clamp(min=1) * by_text


def row_weights(
    module: Any, given: dict[str, Any], index: Tensor, mask: Tensor | None, keys: Tensor, values: Tensor
) -> Tensor:
    """Attention weights [B, H, Q, T] of the rows ``index`` [B, Q], over the keys and values of T columns.

    The module's own code runs for these rows, on its eager path because only that one returns the weights: q K over
    H x Q x T, whatever attention the layer itself uses.

    Args:
        module: an attention module.
        given: its arguments.
        mask: what is added to the scores, [B, 1, Q, T].

    Raises:
        PruningError: an attention that is not understood.
    """
    one = copy.copy(module)  # the weights are shared; the configuration is its own: no other thread sees it
    one.config = copy.copy(module.config)
    one.config._attn_implementation = "eager"
    one.training = False
    one.__dict__.pop("forward", None)  # as wrapped by accelerate it would run the original
    weights = _attend(one, given, index, mask, keys, values)[1]
    if weights is None:
        raise strange("the eager attention of this model returns no weights")
    return weights


def _attend(
    module: Any, given: dict[str, Any], index: Tensor, mask: Tensor | None, keys: Tensor, values: Tensor
) -> Any:
    """Run an attention module for the rows ``index`` [B, Q] of what it was ``given``, over these keys and values."""
    hidden = given["hidden_states"]
    given = {name: value for name, value in given.items() if name not in CACHE_NAMES}
    given |= {"hidden_states": take(hidden, index, 1), "attention_mask": mask}
    take_positions(given, index, hidden.shape[1], module)
    given[cache_argument(module)] = fixed = _Fixed(keys, values)
    output = module.forward(**given)
    if fixed.asked != 1 or not isinstance(output, tuple) or len(output) < 2:
        raise strange("the attention of this model does not ask its cache once, or returns no tuple")
    return output
