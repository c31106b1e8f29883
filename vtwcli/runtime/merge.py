"""Rows made of tokens that are not kept: DPC-kNN clusters, as SparseVLM's code has them (arXiv 2410.04417)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vtwcli.runtime.contract import PruningError
from vtwcli.runtime.rows import Rows, Tensor
from vtwcli.runtime.states import wide
from vtwcli.schedule.words import merged_count

NOISE = 1e-6


@dataclass(eq=False)
class Recycled:
    """What stands where, once tokens were merged.

    The slots of the visual tokens are filled in their order by those that are kept and then by the merged ones, which
    take the last slots; a kept one stays in its own unless these need the room. With positions closed up only the order
    counts.

    Attributes:
        present: slots that are filled with visual rows, [B, S].
        origin: the slot from which a slot's row comes, [B, S]; its own where nothing moved.
        made: which of the merged rows a slot holds, -1: none, [B, S].
        values: the merged rows, [B, C, D].
    """

    present: Tensor
    origin: Tensor
    made: Tensor
    values: Tensor

    def put(self, hidden: Tensor, rows: Rows) -> Tensor:
        """The ``rows``' hidden states [B, T, D] with the merged ones among them."""
        assert rows.index is not None
        if not self.values.shape[1]:
            return hidden
        made = self.made.gather(1, rows.index).to(hidden.device)[:, :, None]
        values = self.values.to(hidden).gather(1, made.clamp(min=0).expand_as(hidden))
        return torch.where(made >= 0, values, hidden)


def recycled(
    action: Mapping[str, Any],
    there: Tensor,
    chosen: Tensor,
    last: Tensor,
    score: Tensor,
    hidden: Tensor,
    place: Tensor,
) -> Recycled:
    """Merge the best of the visual tokens that are not kept.

    Args:
        action: with its ``rest``.
        there, chosen: visual tokens that are present, and those that are kept, [B, S].
        last: the last token of each sample, [B, S].
        score: of all, [B, S].
        hidden: rows that enter the layer, [B, T, D].
        place: where a token's row is among them, [B, S].

    Raises:
        PruningError: a prompt that ends with an image.
    """
    if bool((there & last).any()):
        raise PruningError(
            "merged tokens ('rest') stand behind the image and in front of the text; this prompt ends with an image"
        )
    present, made = torch.zeros_like(there), torch.full_like(place, -1)
    origin = torch.arange(there.shape[1], device=there.device).expand_as(place).clone()
    found = []
    for b in range(len(there)):
        slots, kept = there[b].nonzero()[:, 0], chosen[b].nonzero()[:, 0]
        dropped = (there[b] & ~chosen[b]).nonzero()[:, 0]
        many, few = merged_count(action, len(dropped))
        rows = dropped[score[b, dropped].argsort(descending=True, stable=True)[:many]]
        states = hidden[b, place[b, rows].to(hidden.device)]
        found.append(clusters(states, few, action["rest"]["seed"]) if few else states[:0])
        own = torch.searchsorted(slots, kept)
        room = torch.arange(len(kept), device=slots.device) + len(slots) - few - len(kept)
        new, added = slots[torch.minimum(own, room)], slots[len(slots) - few :]
        present[b, new], present[b, added] = True, True
        origin[b, new], made[b, added] = kept, torch.arange(few, device=slots.device)
    values = hidden.new_zeros(len(there), max(map(len, found), default=0), hidden.shape[2])
    for b, rows in enumerate(found):
        values[b, : len(rows)] = rows
    return Recycled(present, origin, made, values)


def clusters(states: Tensor, number: int, seed: int) -> Tensor:
    """The means [number, D] of clusters of ``states`` [N, D], that of the best centre first.

    Distances are divided by the root of D. A row's density is exp(-mean of the squared distances to its ``number``
    nearest, itself among them), with a little noise that tells equal ones apart; its distance is that to the nearest
    denser row, or the largest of all. Centres are the rows of the largest products of both, and every row goes to the
    nearest centre.
    """
    x = wide(states)
    apart = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") / x.shape[1] ** 0.5
    noise = torch.rand(len(x), generator=torch.Generator().manual_seed(seed)).to(apart) * NOISE
    density = (-apart.topk(number, largest=False).values.square().mean(1)).exp() + noise
    denser = density[None, :] > density[:, None]
    alone = torch.where(denser, apart, apart.max()).min(1).values
    centres = (alone * density).topk(number).indices
    owner = apart[centres].argmin(0)
    owner[centres] = torch.arange(number, device=owner.device)
    total = x.new_zeros(number, x.shape[1]).index_add(0, owner, x)
    weight = x.new_zeros(number).index_add(0, owner, torch.ones_like(x[:, 0])) + 1e-6
    return (total / weight[:, None]).to(states.dtype)
