"""Scores of visual tokens by the attention of chosen rows, in the layer before or as the next one itself sees them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from vtwcli.runtime.asking import check_weights, row_weights
from vtwcli.runtime.cache import Columns, PrunedLayer
from vtwcli.runtime.call import Call
from vtwcli.runtime.contract import CACHE_NAMES, POSITIONS, cache_argument, strange
from vtwcli.runtime.freeze import Enough, entries_of
from vtwcli.runtime.masks import rows_mask
from vtwcli.runtime.plan import PlannedAction
from vtwcli.runtime.rows import Rows, Tensor, compact, take, take_positions
from vtwcli.runtime.scores import last_row_numbers, placed
from vtwcli.runtime.states import change, distinct, wide
from vtwcli.schedule.words import HIDDEN, kept_count

_BLOCK = 64  # rows whose weights are there at once


@dataclass(eq=False)
class Sight:
    """What a layer's attention sees.

    Attributes:
        module: the attention.
        given: its arguments, by name.
        rows: whose hidden states it gets.
        columns: what the entries are that it reads.
        keys, values: those entries, [B, H_kv, T, D].
        past: tokens seen before the chunk.
        mask: the model's own, see ``masks.check_mask``.
    """

    module: Any
    given: dict[str, Any]
    rows: Rows
    columns: Columns
    keys: Tensor
    values: Tensor
    past: int
    mask: Tensor | None


def askers(call: Call, rows: str) -> Tensor:
    """Which of the tokens that are there a score asks, [B, S]; ``rows`` as ``select`` names them."""
    assert call.visual is not None and call.real is not None
    if rows == "all":
        return call.present
    if rows == "visual":
        return call.present & call.visual
    if rows == "last":
        return call.is_last
    if rows == "raters":
        assert call.raters is not None
        return call.raters
    return _question(call)


def _question(call: Call) -> Tensor:
    """The text behind the image, [B, S]; the last row where there is none."""
    assert call.visual is not None and call.real is not None
    behind = call.real & (call.visual.flip(1).cumsum(1).flip(1) == 0) & (call.number > 0)[:, None]
    return torch.where(behind.any(1)[:, None], behind, call.is_last)


def raters(call: Call, hidden: Tensor) -> Tensor:
    """The rows of text behind the image that suit it, [B, S].

    A row's share is that of its dot product with a visual row, in a softmax over the text and in the mean over the
    image; raters have more than the mean. Where none has, all are.

    Args:
        hidden: the embedded prompt, [B, S, D].
    """
    assert call.visual is not None
    found = question = _question(call)
    for b in range(len(question)):
        image, text = (hidden[b, which[b].to(hidden.device)] for which in (call.visual, question))
        if len(image) and len(text):
            share = (wide(image) @ wide(text).T).softmax(1).mean(0).to(question.device)
            above = torch.zeros_like(question[b])
            above[question[b]] = share > share.mean()
            if bool(above.any()):
                found = found.clone()
                found[b] = above
    return found


def look(call: Call, sight: Sight, select: Mapping[str, Any]) -> Tensor:
    """The score [B, S] that a selection asks for: the mean over the rows that it names."""
    hidden = sight.given["hidden_states"]
    index, device = call.index(sight.rows, hidden.device), hidden.device
    asked = askers(call, select["rows"]).to(device).gather(1, index) & sight.rows.query.to(device)
    part = compact(asked)
    assert part.index is not None
    tokens = index.gather(1, part.index)
    total: Any = 0
    for start in range(0, tokens.shape[1], _BLOCK):
        near = slice(start, start + _BLOCK)
        block = Rows(tokens[:, near], part.query[:, near], part.query[:, near], True)
        mask = rows_mask(sight.mask, block, sight.columns, sight.past, call.shape[1], hidden)
        weights = row_weights(sight.module, sight.given, part.index[:, near], mask, sight.keys, sight.values)
        total = total + _scores(select, weights, sight, block.query, part.index[:, near])
    if select["score"] == "attention":
        total = _of_heads(total, select, visual_columns(call, sight))
    scores = total / part.query.sum(1, keepdim=True).clamp(min=1)
    device = call.last.device
    return placed(scores.to(device), sight.columns.position.to(device), sight.past, call.shape[1])


def _scores(select: Mapping[str, Any], weights: Tensor, sight: Sight, query: Tensor, index: Tensor) -> Tensor:
    """The sum over rows of their scores of the columns: contributions [B, T], or attention by head [B, H, T].

    Args:
        weights: of the rows ``index`` [B, Q], [B, H, Q, T].
        query: which of them are tokens', [B, Q].
    """
    if select["score"] == "contribution":
        return last_row_numbers(weights[:, :, -1], sight.values)["contribution"]
    weights = wide(weights) * query[:, None, :, None]
    if select["level"]:
        weights = weights / _distances(sight, index)[:, None]
    return weights.sum(2)


def _of_heads(total: Tensor, select: Mapping[str, Any], visual: Tensor) -> Tensor:
    """The mean [B, T] over heads of [B, H, T]; where only some count, over those that sum up to most on ``visual``."""
    number = select.get("heads")
    if number is not None and number < total.shape[1]:
        most = (total * visual[:, None]).sum(2).topk(number, dim=1).indices
        total = total.gather(1, most[:, :, None].expand(-1, -1, total.shape[2]))
    return total.mean(1)


def visual_columns(call: Call, sight: Sight) -> Tensor:
    """Which of the columns are visual tokens of the chunk that are there, [B, T]."""
    assert call.visual is not None
    position, device = sight.columns.position, sight.keys.device
    place = (position - sight.past).to(call.visual.device)
    there = (call.present & call.visual).gather(1, place.clamp(min=0)) & (place >= 0)
    return there.to(device)


def _distances(sight: Sight, index: Tensor) -> Tensor:
    """What rotary embedding makes of rows of ones: their scaled products between rows ``index`` and columns, [B, Q, T].

    Columns of earlier turns, which are no visual tokens of this prompt, count as 1.
    """
    angles = sight.given.get(POSITIONS)
    if not isinstance(angles, tuple | list) or len(angles) != 2:
        raise strange(f"the attention gets no {POSITIONS} of cosines and sines")
    cos, sin = (wide(x) for x in angles)
    half = cos.shape[-1] // 2
    sign = torch.cat([-torch.ones(half), torch.ones(cos.shape[-1] - half)]).to(cos)
    turned = cos + sign * sin  # [B or 1, n, E]
    if turned.ndim != 3:
        raise strange(f"the attention gets {POSITIONS} of {list(cos.shape)}")
    turned = turned.expand(len(index), -1, -1)
    width = sight.keys.shape[-1]  # of which some may not turn
    product = take(turned, index, 1) @ turned.transpose(1, 2) + (width - turned.shape[-1])
    product = product / width**0.5
    earlier = sight.keys.shape[2] - turned.shape[1]
    return torch.cat([torch.ones_like(product[:, :, :1]).expand(-1, -1, earlier), product], 2)


def key_sizes(call: Call, sight: Sight) -> Tensor:
    """The sum of absolute values of each token's keys over heads, [B, S]."""
    sizes, columns = wide(sight.keys).abs().sum((1, 3)).to(call.last.device), sight.columns
    return placed(sizes, columns.position.to(sizes.device), sight.past, call.shape[1])


def by_states(
    call: Call, rows: Rows, hidden: Tensor, norm: Any, asked: Mapping[int, PlannedAction]
) -> dict[int, Tensor]:
    """The scores [B, S] of actions, by number, that look at the ``rows`` that enter their layer.

    Args:
        hidden: those rows, [B, T, D].
        norm: the model's last.
    """
    found, device = {}, call.last.device
    for number, action in asked.items():
        if action.needs == HIDDEN:
            if call.entered is None or call.entered.shape != hidden.shape:
                raise strange("the rows of the layer before are not those that enter this one")
            index = call.index(rows, device).masked_fill(~rows.query.to(device), -1)
            score = placed(change(call.entered, hidden).to(device), index, 0, call.shape[1])
        else:
            score = _distinct(call, rows, wide(norm(hidden)).to(device), action.select)
        found[number] = score
    return found


def _distinct(call: Call, rows: Rows, states: Tensor, select: Mapping[str, Any]) -> Tensor:
    """1 for the tokens of each sample that are least like its pivots, 0 for others, [B, S]."""
    assert call.visual is not None
    if call.sizes is None:
        raise strange("the attention of this model gave no keys")
    index, score = call.index(rows, states.device), torch.zeros(call.shape, device=states.device)
    there, text = call.present & call.visual, askers(call, "text")
    for b, number in enumerate(call.number.tolist()):
        where = torch.zeros(call.shape[1], dtype=torch.long, device=states.device)
        where[index[b, rows.query[b]]] = rows.query[b].nonzero()[:, 0]
        mine, others = there[b].nonzero()[:, 0], text[b].nonzero()[:, 0]
        if len(mine):
            wanted = kept_count(select, len(mine), number)
            parts = states[b, where[mine]], states[b, where[others]]
            score[b, mine] = distinct(*parts, call.sizes[b, mine], call.sizes[b, others], wanted).float()
    return score


def own_sight(layer: Any, index: int, name: str, given: Mapping[str, Any], call: Call, rows: Rows) -> Sight:
    """What layer ``index`` would see of the rows that enter it, if none of them left.

    Args:
        layer: of the model.
        name: by which it takes its cache.
        given: its arguments for these rows, positions too, but for the mask, which is the model's own.
        rows: that enter it.

    Raises:
        PruningError: a layer that does not hand its attention what it needs, or whose weights are offloaded.
    """
    check_weights(layer)
    here = next(layer.parameters()).device
    cache, mask = given[name], given.get("attention_mask")
    moved = {key: _moved(value, here) for key, value in given.items() if key != name}
    moved |= {name: None, "attention_mask": None}
    entries = entries_of(layer, name, moved)
    attention = _attention_arguments(layer, moved)
    if entries is None:
        raise strange(f"{type(layer).__name__} does not hand its keys to the cache")
    hidden, old, past = moved["hidden_states"], None, 0
    if cache is not None and len(getattr(cache, "layers", ())) > index:
        held = cache.layers[index]
        past = held.get_seq_length()
        if not isinstance(held, PrunedLayer):
            old = PrunedLayer(held, call.shape[0], hidden.device).columns
        else:
            held.recall()
            old = held.columns
        if held.keys is not None and held.keys.numel():
            entries = (
                torch.cat([held.keys.to(here), entries[0]], 2),
                torch.cat([held.values.to(here), entries[1]], 2),
            )
    columns = call.columns(old, rows, past, hidden.device)
    return Sight(layer.self_attn, attention, rows, columns, *entries, past, mask)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, tuple | list):
        return tuple(_moved(one, device) for one in value)
    return value.to(device) if isinstance(value, torch.Tensor) else value


def _attention_arguments(layer: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """What a layer calls its attention with; it runs no further."""
    seen: dict[str, Any] = {}

    def asked(*args: Any, **kwargs: Any) -> None:
        seen.update(kwargs)
        if args:
            seen["hidden_states"] = args[0]
        raise Enough

    one, attention = copy.copy(layer), copy.copy(layer.self_attn)
    attention.__dict__["forward"] = asked
    one._modules = {**one._modules, "self_attn": attention}
    one.__dict__.pop("forward", None)  # as wrapped by accelerate it would run the original
    one.training = False
    with suppress(Enough):
        one.forward(**given)
    if not isinstance(seen.get("hidden_states"), torch.Tensor):
        raise strange(f"{type(layer).__name__} does not call its self_attn with hidden states")
    for cache in CACHE_NAMES:
        seen.pop(cache, None)
    seen[cache_argument(layer.self_attn)] = None
    return seen


def before_layer(
    call: Call, index: int, layer: Any, name: str, given: dict[str, Any], rows: Rows, norm: Any
) -> None:
    """Give the call what the rows that enter layer ``index`` tell, where that decides who stays.

    Args:
        name: by which the layer takes its cache.
        given: its arguments; changed in place.
        rows: that enter it.
        norm: the model's last.
    """
    plan, hidden = call.plan, given["hidden_states"]
    if index == 0 and plan.rates:
        call.raters = raters(call, hidden)
    call.incoming = hidden if plan.merges(index) else None
    call.scores |= by_states(call, rows, hidden, norm, plan.by_states(index))
    if asked := plan.looks_in(index):
        if rows.index is not None:
            take_positions(given, rows.index, call.shape[1], layer.self_attn)
        sight = own_sight(layer, index, name, given, call, rows)
        for number, action in asked.items():
            call.scores[number] = look(call, sight, action.select)
