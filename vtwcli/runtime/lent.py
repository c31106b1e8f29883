"""Layers that have no keys and values of their own and read those of a layer before them, their lender.

Withdrawal at layer K is then what it is anywhere: layers from K on do not read visual tokens, whoever made the keys.
Rows that left before the lender have no entries there; the entries of those that leave behind it stay, since they are
read in between, and are masked in the layers that borrow them. How long each entry is read is kept with the lender's
cache, so that it goes through cropping and beams.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from vtwcli.runtime.cache import NEVER, Columns, PrunedLayer
from vtwcli.runtime.contract import LENT, PruningError, borrows, strange
from vtwcli.runtime.plan import Plan
from vtwcli.runtime.rows import Tensor, compact, take


@dataclass(eq=False)
class Loan:
    """What a lender has in one forward pass.

    Attributes:
        columns: what its entries are.
        tap: what stood in its cache's place, which has its values as they were before mutes; or None.
    """

    columns: Columns
    tap: Any = None


def lenders(layers: Iterable[Any]) -> dict[int, int]:
    """Whose keys and values layers read that have none of their own, by layer.

    Raises:
        PruningError: layers that say they share, but not how.
    """
    found: dict[int, int] = {}
    last: dict[Any, int] = {}
    for index, layer in enumerate(layers):
        attention = getattr(layer, "self_attn", None)
        kind = getattr(attention, "layer_type", None)
        if borrows(attention):
            if kind not in last or LENT not in inspect.signature(layer.forward).parameters:
                raise strange(f"layer {index} reads the keys of a layer that is not known")
            found[index] = last[kind]
        elif getattr(attention, "store_full_length_kv", False):
            last[kind] = index
    return found


def check_plan(plan: Plan, found: Mapping[int, int]) -> None:
    """Refuse what has no meaning, or none that is known, where layers borrow keys and values.

    Args:
        found: see ``lenders``.

    Raises:
        PruningError: the schedule says such a thing.
    """
    if not found:
        return
    first = min(found.values())
    if plan.trims:
        raise PruningError("'every' does not go with layers that share keys and values")
    for action in plan.leaving:
        late = action.at is None or action.at > first
        if late and (action.rest or action.positions == "compact"):
            what = "'rest'" if action.rest else "positions: compact"
            raise PruningError(
                f"{what}: from layer {first} on layers lend their keys to later ones, so rows must not change there; "
                f"start at {first} or earlier"
            )
    for index, lender in found.items():
        if plan.looks_in(index):
            raise PruningError(
                f"layer {index} reads the keys of layer {lender}, so its own scores ('layer: here') do not exist; "
                "take those of the layer before"
            )


def borrowed(
    call: Any, index: int, attention: Any, kwargs: Mapping[str, Any], lender: int
) -> tuple[Columns, Tensor, Tensor]:
    """What the entries are that a layer borrows, those that are not there any more hidden, with keys and values.

    Args:
        call: the forward pass, which has a ``Loan`` of the lender.
        index: of the layer.
        kwargs: its arguments.
    """
    loan: Loan = call.loans[lender]
    columns, tap = loan.columns, loan.tap
    place = columns.position - call.past
    there = columns.position >= 0
    if call.visual is not None:
        stays = call.present.to(place.device).gather(1, place.clamp(0, call.shape[1] - 1))
        there = there & ((place < 0) | stays)
    if columns.until is not None:
        there = there & (columns.until > index)
    if tap is not None:
        keys, values = tap.keys, tap.values
    else:
        try:
            keys, values = kwargs[LENT][attention.layer_type]
        except (KeyError, TypeError):
            raise strange(f"layer {index} gets no keys of layer {lender}") from None
    if bool((columns.position >= 0).eq(there).all()):
        return columns, keys, values
    key = ("lent", lender)
    kept = call.memo.get(key)
    if kept is None or kept[0] is not columns or not torch.equal(kept[1], there):
        # layers borrow the same in turn, so prompts leave out what is not read; steps of an answer are one row each,
        # for which a mask is less work
        rows = compact(there) if call.visual is not None else None
        if rows is None:
            position = columns.position.masked_fill(~there, -1)
            kept = (
                columns,
                there,
                (replace(columns, position=position, ragged=True, picked=None), keys, values),
            )
        else:
            kept = columns, there, (columns.gather(rows), *(take(x, rows.index, 2) for x in (keys, values)))
        call.memo[key] = kept
    return kept[2]


def remember(call: Any, found: Iterable[int]) -> None:
    """Behind the last layer: end the loans, and keep with the caches of lenders in which layers their entries were
    read.

    Args:
        found: the lenders.
    """
    call.loans.clear()
    if call.visual is None or call.cache is None:
        return
    never = torch.full(call.shape, NEVER, device=call.present.device)
    until = torch.where(call.visual & ~call.present, sum(x.long() for x in call.present_at), never)
    if not bool((until < NEVER).any()):
        return
    for index in set(found):
        layer = call.cache.layers[index]
        if isinstance(layer, PrunedLayer):
            columns = layer.columns
            place = (columns.position - call.past).to(until.device)
            new = until.gather(1, place.clamp(0, call.shape[1] - 1)).to(columns.position.device)
            old = torch.full_like(new, NEVER) if columns.until is None else columns.until
            layer.columns = replace(
                columns, until=torch.where(columns.position >= call.past, new, old), picked=None
            )
