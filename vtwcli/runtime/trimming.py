"""What layers forget of the prompt's visual tokens while the answer is written."""

from __future__ import annotations

from typing import Any

import torch

from vtwcli.runtime.cache import Columns, PrunedLayer
from vtwcli.runtime.contract import PruningError
from vtwcli.runtime.plan import PlannedAction
from vtwcli.runtime.rows import TEXT, Tensor, compact
from vtwcli.schedule.words import kept_count


def trims(call: Any, layer: int) -> list[PlannedAction]:
    """What takes tokens away from ``layer`` on, in a pass behind the prompt."""
    prompt = getattr(call.cache, "vtw_prompt", None)
    if prompt is None or call.visual is not None:
        return []
    return call.plan.trims_at(layer, call.past + call.shape[1] - prompt, call.shape[1])


def trim(call: Any, layer: int, held: PrunedLayer) -> None:
    """Let a layer forget what leaves during the answer.

    Raises:
        PruningError: a sliding layer, which forgets some by itself.
    """
    full = held.window is not None and call.past + call.shape[1] >= held.window
    if full and any(action.at == layer for action in call.plan.trims):
        raise PruningError(
            f"layer {layer} has a sliding window of {held.window} tokens; let 'every' start at a layer without"
        )
    for action in trims(call, layer):
        left = gone(action, held, call.entry_numbers)
        call.left = left if call.left is None else call.left | left
    if call.left is not None:
        forget(held, call.left, call.memo)


def spread(numbers: dict[str, Tensor], columns: Columns, total: int) -> dict[str, Tensor]:
    """Numbers of a layer's columns [B, T] by their positions in the whole sequence, [B, total]."""
    place = columns.position.masked_fill(columns.position < 0, total)
    found = {}
    for name, x in numbers.items():
        room = x.new_zeros(len(x), total + 1)
        found[name] = room.scatter(1, place.to(x.device), x)[:, :total]
    return found


def gone(action: PlannedAction, layer: PrunedLayer, numbers: dict[str, Tensor]) -> Tensor:
    """Which positions of the whole sequence leave, of the visual ones that ``layer`` still holds, bool [B, total]."""
    score = numbers[action.select["score"]]
    columns, total = layer.columns, score.shape[1]
    position = columns.position.to(score.device)
    visual = (columns.kind.to(score.device) != TEXT) & (position >= 0)
    there = torch.zeros(len(score), total + 1, dtype=torch.bool, device=score.device)
    there = there.scatter(1, position.masked_fill(~visual, total), True)[:, :total]
    wanted = torch.tensor([kept_count(action.select, n) for n in there.sum(1).tolist()], device=score.device)
    order = score.masked_fill(~there, -torch.inf).argsort(dim=1, descending=True, stable=True)
    return there & (order.argsort(dim=1) >= wanted[:, None])


def forget(layer: PrunedLayer, left: Tensor, memo: dict[Any, Any]) -> None:
    """Take the entries of the positions ``left`` [B, total] out of a layer; ``memo`` shares work between layers."""
    columns = layer.columns
    key = ("forget", id(columns), id(left))
    if key not in memo:
        position = columns.position
        held = left.to(position.device).gather(1, position.clamp(0, left.shape[1] - 1))
        rows = compact((position >= 0) & ~held)
        memo[key] = rows, columns.gather(rows), columns, left
    rows, kept, *_ = memo[key]
    layer.hold(rows, kept)
