"""What a schedule did to the samples of a prompt."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vtwcli.runtime.call import NOBODY, Call


@dataclass(frozen=True)
class ActionTrace:
    """What one ``withdraw`` or ``keep`` did to a sample.

    Attributes:
        action: ``withdraw`` or ``keep``.
        layer: at which it started; None if it did not.
        kept: the tokens that ``keep`` kept, counted among the sample's visual tokens from 0; None if it did not
            start, and for ``withdraw``. Rows that were merged count as tokens -1, -2, ... in the order in which they
            were made.
        images: the same for a selection in front of the language model, one list an image, counted within it from 0,
            in the order in which the rows stand; None for others.
        positions: of a selection in front of the language model: ``compact`` where later tokens were numbered as in
            the shorter prompt, ``original`` where positions have several axes.
    """

    action: str
    layer: int | None
    kept: list[int] | None = None
    images: list[list[int]] | None = None
    positions: str | None = None


@dataclass(frozen=True)
class LayerTrace:
    """What ran in one layer.

    Attributes:
        layer: its number.
        visual: the sample's visual tokens present in it.
        rows: of hidden states computed in it, fillers included; the same for all samples of a batch.
    """

    layer: int
    visual: int
    rows: int


@dataclass(frozen=True)
class SampleTrace:
    """What a schedule did to one sample.

    Attributes:
        visual: number of its visual tokens.
        text: number of the others, without padding.
        actions: what each ``withdraw`` and ``keep`` did, in the schedule's order.
        layers: what ran in each layer, in order.
    """

    visual: int
    text: int
    actions: list[ActionTrace]
    layers: list[LayerTrace]

    @property
    def visual_per_layer(self) -> list[int]:
        """Visual tokens present in each layer."""
        return [layer.visual for layer in self.layers]


@dataclass(frozen=True)
class Trace:
    """What a schedule did to one prompt.

    Attributes:
        samples: one per row of the batch.
    """

    samples: list[SampleTrace]


def traced(call: Call) -> Trace:
    """What happened in a forward pass that is over."""
    plan, (batch, length) = call.plan, call.shape
    if call.visual is None:
        real = [length] * batch if call.real is None else call.real.sum(1).tolist()
        actions = []
        for action in plan.leaving:
            start = action.at if action.at is not None and action.at < plan.depth else None
            actions.append(
                ActionTrace(
                    action.action, start, [] if action.action == "keep" and start is not None else None
                )
            )
        layers = [LayerTrace(layer, 0, length) for layer in range(plan.depth)]
        return Trace([SampleTrace(0, number, actions, layers) for number in real])
    assert call.real is not None
    total, number = call.real.sum(1).tolist(), call.number.tolist()
    present = torch.stack([there.sum(1) for there in call.present_at], 1).tolist()
    fired = torch.stack(call.fired, 1).tolist() if call.fired else [[] for _ in range(batch)]
    samples = []
    for row in range(batch):
        actions = []
        for i, (action, start) in enumerate(zip(plan.leaving, fired[row], strict=True)):
            kept = action.action == "keep" and start >= 0
            tokens = [token for token in call.kept[i][row].tolist() if token != NOBODY] if kept else None
            front = call.front if action.select is plan.front and kept else None
            images = None if front is None else front.kept[row]
            positions = None if front is None else "original" if front.left is None else "compact"
            actions.append(
                ActionTrace(action.action, start if start >= 0 else None, tokens, images, positions)
            )
        counts = enumerate(zip(present[row], call.rows_at, strict=True))
        layers = [LayerTrace(layer, *two) for layer, two in counts]
        samples.append(SampleTrace(number[row], total[row] - number[row], actions, layers))
    return Trace(samples)
