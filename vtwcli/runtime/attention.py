"""The hook behind a layer's attention: what muted rows read, the last row's attention."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from vtwcli.runtime.asking import attend, check_weights, not_compiled, row_weights
from vtwcli.runtime.cache import Columns
from vtwcli.runtime.contract import attention_kind, check_values, strange
from vtwcli.runtime.masks import additive, sunk
from vtwcli.runtime.ranking import Sight, key_sizes, look
from vtwcli.runtime.rows import TEXT, Rows, Tensor, compact, take
from vtwcli.runtime.scores import last_row_numbers, placed, self_cross
from vtwcli.runtime.tap import Tap, tap_of
from vtwcli.runtime.trimming import spread
from vtwcli.schedule.words import KEYED

_CHUNK_WEIGHTS = 1 << 24  # attention weights of some rows that are there at once


def guard_hooks() -> None:
    """Let torch.compile look at hooks before it runs what it compiled: by default code that was compiled for a model
    without hooks also serves one of the same class with hooks, and leaves them out."""
    import torch._dynamo.config as dynamo

    if getattr(dynamo, "skip_nnmodule_hook_guards", False):
        dynamo.skip_nnmodule_hook_guards = False
        torch.compiler.reset()


def leave_attention(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    """Run text rows again with the values their mutes leave them; look at the last row's attention."""
    tap = tap_of(kwargs)
    return output if tap is None else _leave_attention(module, args, kwargs, output, tap)


@not_compiled
def _leave_attention(
    module: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any, tap: Tap
) -> Any:
    tap.due = False
    if tap.keys is None or tap.values is None:
        raise strange("the attention of this model does not hand its keys to the cache")
    if tap.probes or tap.base or tap.second:
        check_values(module, tap.values)
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
        check_weights(module)
        call, sight = tap.call, _sight(module, given, tap)
        with torch.no_grad():
            if call.visual is not None:
                for number, action in call.plan.asks_in(tap.layer).items():
                    call.scores[number] = look(call, sight, action.select)
                if any(a.needs == KEYED for a in call.plan.by_states(tap.layer + 1).values()):
                    call.sizes = key_sizes(call, sight)
            if call.visual is None or call.plan.asks_last(tap.layer):
                call.probe = _probe(module, given, tap, sight)
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
    return here, attend(module, given, here.index, mask, keys, values)[0]


def _sight(module: Any, given: dict[str, Any], tap: Tap) -> Sight:
    """What the attention saw."""
    columns, (batch, length) = tap.columns, tap.call.shape
    assert tap.keys is not None and tap.values is not None
    if columns is None:
        total, wide = tap.past + length, tap.keys.shape[2]
        position = torch.arange(total - wide, total, device=tap.keys.device).expand(batch, wide)
        columns = Columns(position, torch.zeros_like(position, dtype=torch.int8))
    return Sight(module, given, tap.rows, columns, tap.keys, tap.values, tap.past, tap.given)


def _probe(module: Any, given: dict[str, Any], tap: Tap, sight: Sight) -> dict[str, Tensor]:
    """Scores of the chunk's tokens [B, S], from the last row of each sample."""
    call = tap.call
    assert tap.keys is not None and tap.values is not None
    last = call.last_row(tap.rows).to(given["hidden_states"].device)[:, None]
    mask = given.get("attention_mask")
    if mask is not None and mask.ndim == 2:
        mask = mask[:, None, None, :].bool()
    elif mask is not None:
        rows = torch.arange(len(last), device=mask.device)[:, None]
        mask = mask.expand(len(last), *mask.shape[1:])[rows, :, last.to(mask.device)].transpose(1, 2)
    if mask is not None and mask.dtype == torch.bool:
        mask = additive(mask, given["hidden_states"].dtype)
    weights = row_weights(module, given, last, mask, tap.keys, tap.values)
    numbers = last_row_numbers(weights[:, :, 0], tap.values)
    if call.plan.needs_all(tap.layer):
        numbers["self_cross"] = _self_cross(module, given, tap)
    if call.visual is None:
        call.entry_numbers = spread(numbers, sight.columns, tap.past + call.shape[1])
        return {}
    device, position = call.last.device, sight.columns.position
    return {
        name: placed(x.to(device), position.to(device), tap.past, call.shape[1])
        for name, x in numbers.items()
    }


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
        mask = additive(mask, hidden.dtype)
    step = max(1, _CHUNK_WEIGHTS // (batch * wide * getattr(module.config, "num_attention_heads", 1)))
    parts = [slice(at, min(at + step, tall)) for at in range(0, tall, step)]
    found = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
    for part in parts:
        index = torch.arange(part.start, part.stop, device=device).expand(batch, -1)
        weights = row_weights(module, given, index, mask[:, :, part], tap.keys, tap.values)
        found = found + self_cross(weights, visual[:, part], text[:, part])
    by_visual, by_text = found
    return by_visual / visual.sum(1, keepdim=True).clamp(min=1) * by_text
