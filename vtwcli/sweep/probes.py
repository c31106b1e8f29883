"""Last-row measures: what the last token of a prompt reads from visual tokens in each layer.

The next token depends on the attention of the prompt's last row alone, so that one row is computed beside the
library's fused kernel: q_last · K, [heads, S] numbers a layer instead of [heads, S, S]. Time and memory grow with S,
not with its square.

Axes: B batch rows, S sequence, H attention heads, G heads of keys and values, E their width, D hidden width.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from vtwcli.runtime.scores import last_row_numbers
from vtwcli.sweep.views import LayerView, check_values


def masses(weights: Tensor, visual: Tensor, attended: Tensor) -> dict[str, Tensor]:
    """Where the attention of one row goes, mean over heads: m(A) = 1/H · Σ_h Σ_{i in A} w_hi.

    Args:
        weights: attention weights [B, H, S].
        visual, attended: which positions are visual tokens and which are not padding, bool [B, S].

    Returns:
        [B] each: ``prefix`` (text before the first visual token), ``visual``, ``suffix`` (text behind the first
        visual token), which sum to 1, and ``first``, the first visual token alone: models that do not need a place
        to read from often rest their attention there (sinks; Xiao et al., arXiv 2309.17453).
    """
    mean = weights.mean(1)
    before = visual.cumsum(1) == 0
    first = visual & (visual.cumsum(1) == 1)
    text = attended & ~visual
    parts = {"prefix": text & before, "visual": visual, "suffix": text & ~before, "first": first}
    return {name: (mean * part).sum(1) for name, part in parts.items()}


def entropy(weights: Tensor, visual: Tensor) -> Tensor:
    """How widely one row's attention spreads over visual tokens, in nats, mean over heads: [B].

    H = 1/H · Σ_h -Σ_i p_hi ln p_hi with p_hi = w_hi / Σ_{j visual} w_hj; ln V when all V tokens are read alike, 0
    when one token has everything. A head that reads no visual token at all counts as spread evenly.

    Args:
        weights: attention weights [B, H, S].
        visual: bool [B, S]; a row without visual tokens has NaN.
    """
    seen = torch.where(visual[:, None], weights.clamp(min=1e-30), 0.0)
    p = seen / seen.sum(-1, keepdim=True)
    return -torch.special.xlogy(p, p).sum(-1).mean(1)


def value_norms(values: Tensor) -> Tensor:
    """L1 norm of each position's value vector, all heads together: ||v_i||_1, [B, S].

    Tokens that collect attention without saying anything have small ones (VisiPruner, arXiv 2510.17205).

    Args:
        values: [B, G, S, E].
    """
    return values.float().abs().sum((1, 3))


def sinks(attention: Tensor, visual: Tensor, ratio: float) -> Tensor:
    """Visual tokens that get at least ``ratio`` times the attention of the average visual token: bool [B, S].

    Args:
        attention: one row's attention, mean over heads, [B, S].
        visual: bool [B, S].
    """
    mean = (attention * visual).sum(1, keepdim=True) / visual.sum(1, keepdim=True).clamp(min=1)
    return visual & (attention >= ratio * mean)


@dataclass(frozen=True, eq=False)
class LastRow:
    """What one layer's attention does at the last row of one prompt, on the CPU; V visual tokens in order.

    Attributes:
        masses: ``prefix``, ``visual``, ``suffix`` and ``first``, see ``masses``.
        entropy: nats, see ``entropy``.
        attention: weights on visual tokens, mean over heads, float32 [V].
        contribution: ||c_i||_2 with c_i = w_i v_i per head, heads concatenated, before the output projection, [V]
            (VisiPruner, arXiv 2510.17205).
        cosine: cos(o - c_i, o) with o the attention's output before the projection, [V]: 1 where leaving the token
            out would change no direction.
        value_norms: ||v_i||_1, [V].
        sinks: see ``sinks``, bool [V].
        out: the layer's output at the row, [D], where it was computed.
    """

    masses: dict[str, float]
    entropy: float
    attention: Tensor
    contribution: Tensor
    cosine: Tensor
    value_norms: Tensor
    sinks: Tensor
    out: Tensor


class LastRowProbe:
    """A probe of the sweep that measures the first compared row of every sample in every layer.

    Args:
        sink_ratio: see ``sinks``.

    Attributes:
        found: by item and batch row, the layers in order.
    """

    def __init__(self, sink_ratio: float) -> None:
        self.sink_ratio = sink_ratio
        self.found: dict[tuple[int, int], list[LastRow]] = defaultdict(list)

    def __call__(self, view: LayerView) -> None:
        """See ``LayerView``."""
        check_values(view.layer, view.values)
        weights, values = view.attention(view.rows[:, :1])[:, :, 0], view.values
        visual = view.visual.to(weights.device)
        mass = masses(weights, visual, view.attended.to(weights.device))
        spread = entropy(weights, visual)
        # the very numbers that a dynamic schedule decides by
        numbers = last_row_numbers(weights, values)
        norms = value_norms(values)
        sink = sinks(numbers["attention"], visual, self.sink_ratio)
        for b in range(len(visual)):
            mine = visual[b]
            self.found[view.item, b].append(
                LastRow(
                    masses={name: float(value[b]) for name, value in mass.items()},
                    entropy=float(spread[b]),
                    attention=numbers["attention"][b, mine].cpu(),
                    contribution=numbers["contribution"][b, mine].cpu(),
                    cosine=numbers["cosine"][b, mine].cpu(),
                    value_norms=norms[b, mine].cpu(),
                    sinks=sink[b, mine].cpu(),
                    out=view.out[b, 0],
                )
            )
