"""What a schedule did to the samples of a prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from vtwcli.runtime.call import Call


@dataclass(frozen=True)
class Trace:
    """What a schedule did to the samples of one prompt.

    Attributes:
        samples: one dict per batch row: ``visual`` (number of visual tokens), ``text`` (of the others, without
            padding), ``starts`` (per withdraw or keep action, in order: the layer at which it started, None if it
            did not), ``kept`` (per ``keep`` action, by its number among those: the kept tokens, counted among the
            sample's visual tokens from 0; None if it did not start), ``visual_per_layer`` (visual tokens present
            in each layer).
        rows_per_layer: rows of hidden states computed in each layer, fillers included; the same for all samples.
    """

    samples: list[dict[str, Any]]
    rows_per_layer: list[int]


def traced(call: Call) -> Trace:
    plan, samples = call.plan, []
    if call.visual is None:
        batch, length = call.shape
        text = [length] * batch if call.real is None else call.real.sum(1).tolist()
        starts = [a.at if a.at is not None and a.at < plan.depth else None for a in plan.leaving]
        kept: dict[int, Any] = {
            i: None if starts[i] is None else [] for i, a in enumerate(plan.leaving) if a.action == "keep"
        }
        none = [0] * plan.depth
        samples = [
            {"visual": 0, "text": n, "starts": starts, "kept": kept, "visual_per_layer": none} for n in text
        ]
        return Trace(samples, [length] * plan.depth)
    per_layer = torch.stack([p.sum(1) for p in call.present_at], 1).tolist()
    fired = [f.tolist() for f in call.fired]
    assert call.real is not None
    total = call.real.sum(1).tolist()
    for row, number in enumerate(call.number.tolist()):
        begun = [f[row] if f[row] >= 0 else None for f in fired]
        kept = {}
        for i, action in enumerate(plan.leaving):
            if action.action == "keep":
                kept[i] = None if begun[i] is None else call.ordinal[row, call.kept[i][row]].tolist()
        samples.append(
            {
                "visual": number,
                "text": total[row] - number,
                "starts": begun,
                "kept": kept,
                "visual_per_layer": per_layer[row],
            }
        )
    return Trace(samples, list(call.rows_at))
