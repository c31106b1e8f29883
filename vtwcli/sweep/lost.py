"""What attention loses in each layer when the visual tokens leave that are read least (FitPrune, arXiv 2409.10197)."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from vtwcli.runtime.scores import self_cross
from vtwcli.sweep.views import LayerView

STEPS = 100  # of shares of visual tokens
_CHUNK_WEIGHTS = 1 << 24  # attention weights of some rows that are there at once


class LostProbe:
    """A probe of the sweep: the share of attention that leaves with the tokens of lowest ``self_cross``.

    Looked at is the prompt, up to the first compared row.

    Attributes:
        found: by item and batch row, for each layer in order, with 0, 1, .., 100 % of the visual tokens gone: the
            share lost of visual rows' attention to vision, or of text rows', whichever is larger; float32 [101].
            Empty without visual tokens.
    """

    def __init__(self) -> None:
        self.found: dict[tuple[int, int], list[Tensor]] = defaultdict(list)

    def __call__(self, view: LayerView) -> None:
        """See ``LayerView``."""
        batch, length = view.visual.shape
        place = torch.arange(length, device=view.visual.device)
        asks = view.attended & (place <= view.rows[:, :1].to(place.device))
        visual, text = view.visual & asks, asks & ~view.visual
        first = view.attention(view.rows[:, :1])
        step = max(1, _CHUNK_WEIGHTS // first.numel())
        factors = first.new_zeros(2, batch, length)
        for at in range(0, length, step):
            part = slice(at, min(at + step, length))
            index = place[part].expand(batch, -1).to(view.rows.device)
            weights = view.attention(index)
            there = (x[:, part].to(weights.device) for x in (visual, text))
            factors += self_cross(weights, *there)
        for b in range(batch):
            mine = factors[:, b, visual[b].to(factors.device)].cpu()
            if mine.shape[1]:
                self.found[view.item, b].append(lost(*mine))


def lost(by_visual: Tensor, by_text: Tensor) -> Tensor:
    """See ``LostProbe.found``, for one layer.

    Args:
        by_visual, by_text: the factors of ``self_cross``, [V].
    """
    order = (by_visual * by_text).argsort(stable=True)
    gone = torch.stack([by_visual, by_text])[:, order].cumsum(1)
    share = torch.cat([gone.new_zeros(2, 1), gone / gone[:, -1:].clamp(min=1e-30)], 1).amax(0)
    steps = torch.arange(STEPS + 1) * (len(order)) // STEPS
    return share[steps].float()
