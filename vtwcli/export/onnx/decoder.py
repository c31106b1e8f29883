"""The text model's layers as decoder graphs: explicit masks, plain keys and values, gathers, frozen rows.

Axes: B batch, S sequence, P past, T kept tokens, M rows whose logits are wanted, D hidden size.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vtwcli.export.onnx.frozen import Parts, freeze
from vtwcli.export.onnx.modules import PlainCache, Probe, gather, mask, shallow
from vtwcli.sweep.layers import cache_argument


class Layers(nn.Module):
    """The text model's own forward over some of its layers.

    Args:
        text_model: the stock text model.
        lo: first layer.
        hi: first layer that is not run any more.
        norm: whether the final norm runs behind them.
        tapped: the layers whose output is kept in ``taps``.
        score: kind of the scores of columns that the last of the layers takes, or None.
        frozen: the layers in which visual rows are not updated, perhaps others too.
    """

    def __init__(
        self,
        text_model: Any,
        lo: int,
        hi: int,
        norm: bool,
        tapped: range,
        score: str | None = None,
        frozen: Collection[int] = (),
    ) -> None:
        super().__init__()
        self.lo, self.hi = lo, hi
        self.frozen = {d for d in frozen if lo <= d < hi}
        self.parts = Parts()
        self.probe = Probe(score) if score else None
        self.text_model = shallow(text_model)
        self.text_model.layers = nn.ModuleList()
        self.taps: dict[int, Tensor] = {}
        for index in range(lo, hi):
            layer = shallow(text_model.layers[index])
            layer._forward_hooks = OrderedDict()
            if index in tapped:
                layer.register_forward_hook(self._tap(index))
            if self.probe is not None and index == hi - 1:
                layer.self_attn = shallow(layer.self_attn)
                layer.self_attn.probe = self.probe
            if index in self.frozen:
                freeze(layer, self.parts)
            self.text_model.layers.append(layer)
        self.text_model.config = copy.copy(text_model.config)
        self.text_model.config.num_hidden_layers = hi - lo
        if not norm:
            self.text_model.norm = nn.Identity()

    def _tap(self, index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self.taps[index] = output[0] if isinstance(output, tuple) else output

        return hook

    def forward(
        self, hidden: Tensor, attended: Tensor, position_ids: Tensor, past: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Hidden states [B, S, D] and present keys and values, alternating; ``past`` alternates likewise."""
        layers = range(self.lo, self.hi)
        if (
            self.probe is not None and self.hi - 1 in self.frozen
        ):  # there the last token has the last row that runs
            assert self.probe.row is not None and self.parts.text is not None
            self.probe.row = torch.full_like(self.probe.row, self.parts.text.shape[1] - 1)
        cache = PlainCache({d: (past[2 * i], past[2 * i + 1]) for i, d in enumerate(layers)})
        out = self.text_model(
            inputs_embeds=hidden,
            attention_mask=mask(attended, hidden.shape[1], hidden.dtype),
            position_ids=position_ids,
            use_cache=True,
            **{cache_argument(self.text_model): cache},
        ).last_hidden_state
        return out, [x for d in layers for x in cache.present[d]]


class Decoder(nn.Module):
    """One decoder graph: some layers, the gather before them, the head behind them.

    Inputs in order: hidden states [B, S, D]; ``keep_index`` [B, T] if ``gathers``; ``text_index`` and ``visual_index``
    (see ``frozen``) if some layer is frozen; ``logits_index`` [B, M] if there
    is a head; ``score_index`` [B, 1] if the layers take scores; ``attention_mask`` [B, P + T]; ``position_ids``
    [B, T] or [3, B, T]; past keys and values.
    """

    def __init__(self, layers: Layers, head: nn.Module | None, gathers: bool) -> None:
        super().__init__()
        self.layers, self.head, self.gathers = layers, head, gathers

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Logits [B, M, V] or hidden states [B, T, D]; scores [B, P + T]; present keys and values; the taps."""
        given = iter(tensors)
        hidden = next(given)
        if self.gathers:
            hidden = gather(hidden, next(given))
        if self.layers.frozen:
            self.layers.parts.text, self.layers.parts.visual = next(given), next(given)
        logits_index = next(given) if self.head is not None else None
        probe = self.layers.probe
        if probe is not None:
            probe.row = next(given)
        attended, position_ids = next(given), next(given)
        out, present = self.layers(hidden, attended, position_ids, list(given))
        if self.head is not None and logits_index is not None:
            out = self.head(gather(out, logits_index))
        scores = [] if probe is None or probe.scores is None else [probe.scores]
        return out, *scores, *present, *self.layers.taps.values()


class MergedDecoder(nn.Module):
    """Both parts of the decoder in one graph, with the gather between them.

    Inputs in order: ``inputs_embeds`` [B, S, D]; ``attention_mask`` [B, P + S]; ``position_ids`` [B, S] or
    [3, B, S]; ``keep_index`` [B, T]; ``kept_attention_mask`` [B, P' + T]; ``logits_index`` [B, M];
    ``text_index`` and ``visual_index`` (see ``frozen``) if some lower layer is frozen, then those of the kept tokens if
    some upper one is; past keys and values of the lower layers (length P), then of the upper ones (length P').
    """

    def __init__(self, lower: Layers, upper: Layers, head: nn.Module) -> None:
        super().__init__()
        self.lower, self.upper, self.head = lower, upper, head

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Logits [B, M, V]; present keys and values; the taps."""
        hidden, attended, position_ids, keep_index, kept, logits_index, *past = tensors
        for part in (self.lower, self.upper):
            if part.frozen:
                part.parts.text, part.parts.visual, *past = past
        cut = 2 * (self.lower.hi - self.lower.lo)
        hidden, present = self.lower(hidden, attended, position_ids, past[:cut])
        rows = torch.arange(hidden.shape[0], device=hidden.device)[:, None]
        out, more = self.upper(
            gather(hidden, keep_index), kept, position_ids[..., rows, keep_index], past[cut:]
        )
        logits = self.head(gather(out, logits_index))
        return logits, *present, *more, *self.lower.taps.values(), *self.upper.taps.values()
