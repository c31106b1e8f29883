"""The model's own stream of one batch between its layers, and what the layers are handed for it or for parts of it.

Axes: B batch rows, S sequence, Q rows that run, R compared rows, D width, H heads of keys and values, E their width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vtwcli.errors import VtwError
from vtwcli.judge.kl import check_hidden
from vtwcli.sweep.caches import KeysValues, Lent, keys_values, run
from vtwcli.sweep.layers import Capture
from vtwcli.sweep.reach import as_bool, explicit, readable, rotary, take
from vtwcli.sweep.views import LayerView, Probe


class Stream:
    """The full stream of one batch. For each layer in order call ``enter``, then ``through`` or, for the last,
    ``end``; in between whatever reads from it can run.

    Args:
        number: the batch's number, for probes.
        capture: what the model hands its layers.
        rows: positions to be compared, [B, R].
        eager: whether the layers' attention takes additive masks only.
        name: what the batch is called in messages.
        probes: called with a ``LayerView`` at every layer.

    Attributes:
        hidden: [B, S, D]; behind the last layer [B, R, D] at the compared rows.
        masks: those of all layers, by id, as ``as_bool`` gives them.
        lent: keys and values of all rows for later layers, [B, H, S, E].

    Raises:
        NotFoundError: hidden states that are not finite; names the batch, the layer and the type.
        VtwError: layers that are handed something which is not understood.
    """

    def __init__(
        self,
        number: int,
        capture: Capture,
        rows: Tensor,
        eager: bool,
        name: str = "the batch",
        probes: Sequence[Probe] = (),
    ) -> None:
        _check_arguments(capture)
        check_hidden(capture.hidden, capture.attended, name, "the embeddings of text and images are")
        self.number, self.capture, self.probes, self.eager, self.name = number, capture, probes, eager, name
        self.hidden = capture.hidden
        self.rows = rows.to(self.hidden.device)
        self.depth = len(capture.kwargs)
        self.lent = Lent()
        # Layers share their mask objects, so there are few different ones.
        given = {id(kwargs.get("attention_mask")): kwargs.get("attention_mask") for kwargs in capture.kwargs}
        self.masks = {key: as_bool(mask) for key, mask in given.items()}

    def enter(self, d: int) -> Tensor | None:
        """Add what the model itself adds before layer ``d``; it is also returned, [B, S, D]."""
        added = self.capture.added.get(d)
        if added is not None:
            self.hidden = self.hidden + added
            where = f"what the model adds before layer {d} is"
            check_hidden(self.hidden, self.capture.attended, self.name, where)
        return added

    def through(self, d: int, layer: nn.Module) -> KeysValues:
        """Run layer ``d``; returns the keys and values that its attention read, [B, H, S, E]."""
        kept: list[Tensor] = []
        entry = self.hidden

        def keep(keys: Tensor, values: Tensor) -> KeysValues:
            kept.extend((keys, values))
            return keys, values

        self.hidden = run(layer, entry, self.capture.kwargs[d], keep, self.lent.get(layer))
        self.check(self.hidden, self.capture.attended, d)
        keys, values = kept
        self.lent.put(layer, (keys, values))
        if self.probes:
            self._probe(d, layer, entry, take(self.hidden, self.rows), keys, values)
        return keys, values

    def end(self, d: int, layer: nn.Module) -> KeysValues:
        """The last layer: keys and values of all rows, all the rest for the compared rows only."""
        entry = self.hidden
        lent = self.lent.get(layer)
        keys, values = lent or keys_values(layer, entry, self.capture.kwargs[d])
        allowed = readable(self.mask(d), self.rows, entry.shape[1])
        kwargs = self.arguments(d, self.rows, allowed)
        self.hidden = run(layer, take(entry, self.rows), kwargs, lambda *_: (keys, values), lent)
        self.check(self.hidden, self.capture.attended.gather(1, self.rows), d)
        self._probe(d, layer, entry, self.hidden, keys, values)
        return keys, values

    def mask(self, d: int) -> Tensor | None:
        """Who may read whom in layer ``d``, bool [B or 1, S, S]; None: causal."""
        return self.masks[id(self.capture.kwargs[d].get("attention_mask"))]

    def check(self, hidden: Tensor, read: Tensor, d: int, what: str = "") -> None:
        """See ``kl.check_hidden``; ``hidden`` is the output of layer ``d``, ``what`` says of which stream."""
        check_hidden(hidden, read, self.name, f"the output of layer {d}{what} is")

    def arguments(
        self, d: int, rows: Tensor, allowed: Tensor, times: int = 1, eager: bool | None = None
    ) -> dict[str, Any]:
        """The layer's arguments for ``times`` copies of ``rows`` [B, Q] under a bool mask [B, times*Q, n].

        Args:
            eager: whether the mask is to be additive; by default as the layers' own attention takes it.
        """
        kwargs = dict(self.capture.kwargs[d])
        embeddings, positions = kwargs.get("position_embeddings"), kwargs.get("position_ids")
        if isinstance(embeddings, Tensor):
            kwargs["position_embeddings"] = rotary(embeddings, rows, times)
        elif embeddings is not None:
            kwargs["position_embeddings"] = tuple(rotary(x, rows, times) for x in embeddings)
        if positions is not None:
            index = rows[(None,) * (positions.ndim - 2)]
            kwargs["position_ids"] = torch.cat([positions.take_along_dim(index, -1)] * times, dim=-1)
        for name in self.capture.by_row & kwargs.keys():
            if kwargs[name] is not None:
                kwargs[name] = torch.cat([take(kwargs[name], rows)] * times, dim=1)
        additive = self.eager if eager is None else eager
        kwargs["attention_mask"] = explicit(allowed[:, None], additive, self.hidden.dtype)
        return kwargs

    def _probe(
        self, d: int, layer: nn.Module, entry: Tensor, out: Tensor, keys: Tensor, values: Tensor
    ) -> None:
        """Show layer ``d`` to the probes; arguments as the fields of ``LayerView``."""
        seen, length = self.capture, entry.shape[1]

        def arguments(rows: Tensor) -> dict[str, Any]:
            return self.arguments(d, rows, readable(self.mask(d), rows, length), eager=True)

        at = (self.number, d, layer, seen.visual, seen.attended, self.rows)
        view = LayerView(*at, entry, out, keys, values, arguments)
        for probe in self.probes:
            probe(view)


def _check_arguments(capture: Capture) -> None:
    """Refuse layers that are handed something per position which the walk would not cut to the rows it runs."""
    length = capture.hidden.shape[1]
    for kwargs in capture.kwargs:
        for name, value in kwargs.items():
            if name in ("attention_mask", "position_embeddings", "position_ids", *capture.by_row):
                continue
            for x in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(x, Tensor) and length > 1 and length in x.shape:
                    raise VtwError(f"the sweep does not understand the layer argument {name!r}")
