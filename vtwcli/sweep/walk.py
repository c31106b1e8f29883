"""One batch on its way through the layers: the full stream, and beside it the streams of many interventions.

Attention decides which rows an intervention can reach: those that read what it changes, those that read them, and
so on. All other rows are the full model's at every layer. So beside the full stream walk only the reached rows of
each begun intervention (under causal attention the suffix), and they read the untouched rows' keys and values from
the full stream, shared and not copied. An intervention that starts at layer k begins there as a copy of the full
stream's rows, since until k the two runs are the same; of those that start together and differ in where they stop,
all but the last to stop begin where they part from it.

Several streams run as one sequence of M*Q rows under a block-diagonal mask. Rotary embeddings are in the keys
already, so the order of the columns is free, and the streams' own keys stand in front of the full stream's. The
layers are the library's own; a stand-in for the key/value cache lets them read the shared keys and values.

Axes in the comments: B batch rows, S sequence, M streams, Q reached rows, R compared rows, D width, H heads of keys
and values, E their width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vtwcli.errors import VtwError
from vtwcli.judge.kl import check_hidden
from vtwcli.schedule.intervention import Intervention
from vtwcli.sweep.layers import Capture, cache_argument

_CHUNK_ROWS = 384  # rows of begun streams that run as one sequence


# ---------------------------------------------------------------------------------------------------------------
# Who reads whom


def as_bool(mask: Tensor | None) -> Tensor | None:
    """A recorded attention mask [B or 1, 1, S, S] as bool [B or 1, S, S]; None stands for causal.

    Raises:
        VtwError: a mask of another shape, or one that adds a bias to the scores.
    """
    if mask is None:
        return None
    if mask.ndim != 4 or mask.shape[1] != 1:
        raise VtwError(f"the sweep does not understand an attention mask of shape {list(mask.shape)}")
    if mask.dtype == torch.bool:
        return mask[:, 0]
    allowed = mask == 0
    if not bool((allowed | (mask <= torch.finfo(mask.dtype).min / 2)).all()):
        raise VtwError("the sweep does not understand an attention mask that adds a bias")
    return allowed[:, 0]


def explicit(allowed: Tensor, eager: bool, dtype: torch.dtype) -> Tensor:
    """A bool mask in the form that the attention implementation takes; eager attention adds it to the scores."""
    if not eager:
        return allowed
    return torch.zeros_like(allowed, dtype=dtype).masked_fill_(~allowed, torch.finfo(dtype).min)


def readable(mask: Tensor | None, rows: Tensor, length: int) -> Tensor:
    """Which of ``length`` columns ``rows`` [B, Q] may read under a layer's own ``mask``: bool [B, Q, S]."""
    if mask is None:
        return torch.arange(length, device=rows.device) <= rows[:, :, None]
    return mask.expand(len(rows), -1, -1).gather(1, rows[:, :, None].expand(-1, -1, length))


def _readers(masks: Iterable[Tensor | None], columns: Tensor) -> Tensor:
    """Rows [B, S] that may read one of ``columns`` [B, S] in some layer."""
    found = torch.zeros_like(columns)
    for mask in masks:
        found |= columns.cumsum(1) > 0 if mask is None else (mask & columns[:, None, :]).any(-1)
    return found


def reached(kind: str, masks: Sequence[Tensor | None], visual: Tensor, attended: Tensor) -> Tensor:
    """Rows [B, S] whose values an intervention of this kind can change.

    Args:
        masks: all masks that occur in the layers, as ``as_bool`` gives them.
        visual, attended: which positions are visual tokens and which are not padding, [B, S].
    """
    text = attended & ~visual
    if kind == "freeze":
        rows, living = visual, attended
    else:
        # Nobody reads withdrawn tokens, so what becomes of them does not matter.
        rows, living = text & _readers(masks, visual), text if kind == "withdraw" else attended
    while True:
        more = rows | (living & _readers(masks, rows))
        if torch.equal(more, rows):
            return rows
        rows = more


def take(hidden: Tensor, rows: Tensor) -> Tensor:
    """Rows [B, Q] of a stream [B, S, D]: [B, Q, D]."""
    return hidden.gather(1, rows[:, :, None].expand(-1, -1, hidden.shape[2]))


def _rotary(embedding: Tensor, rows: Tensor, times: int) -> Tensor:
    """``times`` copies, one behind the other, of a rotary embedding [..., B or 1, S, E] at ``rows`` [B, Q]."""
    index = rows[(None,) * (embedding.ndim - 3)].unsqueeze(-1)
    return torch.cat([embedding.take_along_dim(index, -2)] * times, dim=-2)


# ---------------------------------------------------------------------------------------------------------------
# Caches that record and share

KeysValues = tuple[Tensor, Tensor]


class _Enough(Exception):
    """A layer has shown what was wanted of it; the rest of it need not run."""


class _Cache:
    """Stands in for a key/value cache: ``read`` gets the keys and values [B, H, n, E] of the layer's rows and
    returns those that its attention shall read."""

    def __init__(self, read: Callable[[Tensor, Tensor], KeysValues]) -> None:
        self._read = read
        self.updates = 0

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> KeysValues:
        """Called by the layer once."""
        self.updates += 1
        return self._read(keys, values)

    def get_seq_length(self, *_: Any) -> int:
        """Nothing stands before the rows that run."""
        return 0


def _run(layer: nn.Module, hidden: Tensor, kwargs: dict[str, Any], read: Callable) -> Tensor:
    """The stock layer's output for ``hidden`` [B, n, D] with ``read`` as its cache."""
    cache = _Cache(read)
    out = layer(hidden, **{**kwargs, cache_argument(layer): cache})
    if cache.updates != 1:
        raise VtwError(f"{type(layer).__name__} asked its cache {cache.updates} times, not once")
    return (out[0] if isinstance(out, tuple) else out).to(hidden.device)


def _keys_values(layer: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> KeysValues:
    """Only the keys and values of the rows: the layer is left as soon as it has computed them."""
    kept: list[Tensor] = []

    def keep(keys: Tensor, values: Tensor) -> KeysValues:
        kept.extend((keys, values))
        raise _Enough

    try:
        layer(hidden, **{**kwargs, cache_argument(layer): _Cache(keep)})
    except _Enough:
        return kept[0], kept[1]
    raise VtwError(f"{type(layer).__name__} did not ask its cache")


class _Shared:
    """One buffer of keys and values that all chunks of a layer read: [own rows | the full stream's columns]."""

    def __init__(self, own: int, keys: Tensor, values: Tensor) -> None:
        self.own = own
        self.keys, self.values = (
            torch.cat([x.new_empty(*x.shape[:2], own, x.shape[3]), x], dim=2) for x in (keys, values)
        )

    def reader(self, reach: int, own: KeysValues | None = None) -> Callable[[Tensor, Tensor], KeysValues]:
        """A cache function that puts a chunk's own rows right before the first ``reach`` shared columns.

        The own rows are those that the layer hands over, or ``own`` where they are known already.
        """

        def read(keys: Tensor, values: Tensor) -> KeysValues:
            keys, values = own or (keys, values)
            start = self.own - keys.shape[2]
            self.keys[:, :, start : self.own], self.values[:, :, start : self.own] = keys, values
            window = slice(start, self.own + reach)
            return self.keys[:, :, window], self.values[:, :, window]

        return read


def _diagonal(own: Sequence[Tensor], full: Sequence[Tensor]) -> Tensor:
    """The mask [B, M*Q', M*Q + n] of M streams that read their own rows [B, Q', Q] and shared columns [B, Q', n]."""
    batch, rows, count = own[0].shape
    streams = len(own)
    mask = own[0].new_zeros(batch, streams, rows, streams * count + full[0].shape[2])
    for m in range(streams):
        mask[:, m, :, m * count : (m + 1) * count] = own[m]
        mask[:, m, :, streams * count :] = full[m]
    return mask.flatten(1, 2)


# ---------------------------------------------------------------------------------------------------------------
# What probes see


class AttentionRows(NamedTuple):
    """What a layer's attention computes with for some rows.

    Attributes:
        query: after rotary embedding, [B, heads, R, E].
        keys, values: of all rows, [B, H, S, E].
        allowed: which columns each row may read, bool [B, R, S].
        scaling: factor on query · key.
        softcap: bound that the scores approach, or None.
    """

    query: Tensor
    keys: Tensor
    values: Tensor
    allowed: Tensor
    scaling: float
    softcap: float | None

    def weights(self) -> Tensor:
        """Attention weights, float32 [B, heads, R, S], each row summing to 1."""
        keys = self.keys.repeat_interleave(self.query.shape[1] // self.keys.shape[1], 1)
        scores = (self.query @ keys.transpose(2, 3)).float() * self.scaling
        if self.softcap is not None:
            scores = (scores / self.softcap).tanh() * self.softcap
        return scores.masked_fill(~self.allowed[:, None], -torch.inf).softmax(-1)


@dataclass(frozen=True, eq=False)
class LayerView:
    """The full stream at one layer, for probes.

    Attributes:
        item: number of the item in the sweep.
        index: 0-based layer.
        layer: the stock decoder layer, ready to run.
        visual, attended: which positions are visual tokens and which are not padding, bool [B, S].
        rows: the item's compared positions, [B, R].
        hidden_in: the layer's input, [B, S, D].
        out: the layer's output at the compared positions, [B, R, D].
        keys, values: what its attention read, after rotary embedding, [B, H, S, E].
    """

    item: int
    index: int
    layer: nn.Module
    visual: Tensor
    attended: Tensor
    rows: Tensor
    hidden_in: Tensor
    out: Tensor
    keys: Tensor
    values: Tensor
    _walk: Walk

    def attention(self, rows: Tensor | None = None) -> AttentionRows:
        """What the attention of ``rows`` [B, R] (the compared ones by default) computes with.

        Only these rows run, and only up to the attention itself.
        """
        return self._walk.attention(self, self.rows if rows is None else rows)


Probe = Callable[[LayerView], None]


# ---------------------------------------------------------------------------------------------------------------
# The walk


class _Pattern(NamedTuple):
    """What one stream may read in a layer: own rows [B, Q', Q], the full stream's columns [B, Q', S], and how many
    of the latter are not masked for everyone at the end."""

    own: Tensor
    full: Tensor
    reach: int


class Group:
    """All interventions of one kind on one batch: they reach the same rows and differ in their layers.

    Attributes:
        numbers: their places in the list of interventions, in order of ``begins``, so the begun ones are first.
        members: the interventions in the same order.
        begins: the layer at which the stream of each begins.
        copies: the member whose stream it begins as a copy of, or None for the full stream.
        begun: how many have begun.
        rows: positions of the reached rows, [B, Q]; a batch row with fewer is filled up with other positions.
        valid: which entries of ``rows`` are reached, [B, Q].
        hidden: their streams, [B, M, Q, D]; behind the last layer [B, M, R, D] at the compared rows.
    """

    def __init__(self, members: Sequence[tuple[int, Intervention]], capture: Capture, rows: Tensor) -> None:
        depth = len(capture.kwargs)
        last: dict[int, Intervention] = {}  # by start layer, the one that stops last

        def end(one: Intervention) -> int:
            return depth if one.stop is None else min(one.stop, depth)

        def begin(one: Intervention) -> int:
            return one.start if end(one) == end(last[one.start]) else end(one)

        for _, one in sorted(members, key=lambda pair: end(pair[1])):
            last[one.start] = one
        members = sorted(members, key=lambda pair: begin(pair[1]))
        self.numbers = [number for number, _ in members]
        self.members = [one for _, one in members]
        self.begins = [begin(one) for one in self.members]
        self.copies = [
            None if at == one.start else self.members.index(last[one.start])
            for at, one in zip(self.begins, self.members, strict=True)
        ]
        self.kind = self.members[0].kind
        self.begun = 0
        counts = rows.sum(1)
        self.reached = rows
        self.count = int(counts.max())
        self.rows = rows.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, : self.count]
        self.valid = torch.arange(self.count, device=rows.device) < counts[:, None]
        self.visual_rows = capture.visual.gather(1, self.rows)
        batch, _, width = capture.hidden.shape
        self.hidden = capture.hidden.new_empty(batch, len(members), self.count, width)
        self.patterns: dict[tuple[int, bool], tuple[_Pattern, _Pattern]] = {}

    def find(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Where ``positions`` [B, R] are among the reached rows: index [B, R], and whether they are there at all."""
        same = (self.rows[:, None, :] == positions[:, :, None]) & self.valid[:, None, :]
        return same.long().argmax(-1), same.any(-1)


class Walk:
    """One batch between the layers. Call ``step`` for each layer in order, then read ``hidden`` and ``groups``.

    Args:
        number: the batch's number, for probes.
        capture: what the model hands its layers.
        rows: positions to be compared, [B, R].
        interventions: what to try.
        probes: called with a ``LayerView`` at every layer.
        eager: whether the layers' attention takes additive masks only.
        name: what the batch is called in messages.

    Attributes:
        hidden: the full stream, [B, S, D]; behind the last layer [B, R, D] at the compared rows.
        groups: the streams of the interventions, for kinds that reach any row.
        seconds: time spent here.

    Raises:
        NotFoundError: hidden states that are not finite; names the batch, the layer and the type.
    """

    def __init__(
        self,
        number: int,
        capture: Capture,
        rows: Tensor,
        interventions: Sequence[Intervention],
        probes: Sequence[Probe],
        eager: bool,
        name: str = "the batch",
    ) -> None:
        began = time.perf_counter()
        _check_arguments(capture)
        self.name = name
        check_hidden(capture.hidden, capture.attended, name, "the embeddings of text and images are")
        self.number, self.capture, self.probes, self.eager = number, capture, probes, eager
        self.hidden = capture.hidden
        self.rows = rows.to(self.hidden.device)
        self.depth = len(capture.kwargs)
        # Layers share their mask objects, so there are few different ones.
        given = {id(kwargs.get("attention_mask")): kwargs.get("attention_mask") for kwargs in capture.kwargs}
        self._masks = {key: as_bool(mask) for key, mask in given.items()}
        self.groups: list[Group] = []
        for kind in dict.fromkeys(one.kind for one in interventions):
            touched = reached(kind, list(self._masks.values()), capture.visual, capture.attended)
            if touched.any():
                members = [(i, one) for i, one in enumerate(interventions) if one.kind == kind]
                self.groups.append(Group(members, capture, touched))
        self.seconds = time.perf_counter() - began

    def step(self, d: int, layer: nn.Module) -> None:
        """Advance all streams through layer ``d``; of the last layer's output only the compared rows are computed."""
        began = time.perf_counter()
        added = self.capture.added.get(d)
        if added is not None:
            self.hidden = self.hidden + added
            where = f"what the model adds before layer {d} is"
            check_hidden(self.hidden, self.capture.attended, self.name, where)
        for group in self.groups:
            self._begin(group, d, added)
        if d == self.depth - 1:
            self._last(d, layer)
        else:
            keys, values = self._full(d, layer)
            for group in self.groups:
                self._advance(group, d, layer, keys, values)
                self._check(group.hidden[:, : group.begun], group.valid[:, None], d, group)
        self.seconds += time.perf_counter() - began

    def attention(self, view: LayerView, rows: Tensor) -> AttentionRows:
        """See ``LayerView.attention``."""
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        seen: dict[str, Any] = {}

        def record(module: nn.Module, query: Tensor, *_: Any, **given: Any) -> None:
            scaling = given.get("scaling")
            seen.update(query=query, scaling=query.shape[-1] ** -0.5 if scaling is None else scaling)
            seen.update(softcap=given.get("softcap"))
            raise _Enough

        allowed = readable(self._mask(view.index), rows, view.hidden_in.shape[1])
        kwargs = self._row_kwargs(view.index, rows, 1, allowed)
        name = "eager" if self.eager else "sdpa"
        ALL_ATTENTION_FUNCTIONS[name] = record
        try:
            _run(view.layer, take(view.hidden_in, rows), kwargs, lambda *_: (view.keys, view.values))
        except _Enough:
            return AttentionRows(keys=view.keys, values=view.values, allowed=allowed, **seen)
        finally:
            del ALL_ATTENTION_FUNCTIONS[name]
        raise VtwError(f"{type(view.layer).__name__} does not use the library's attention functions")

    def _begin(self, group: Group, d: int, added: Tensor | None) -> None:
        """Give begun streams what the model adds before layer ``d``, then start those whose layer has come."""
        if added is not None and group.begun:
            group.hidden[:, : group.begun] += take(added, group.rows)[:, None]
        while group.begun < len(group.members) and group.begins[group.begun] == d:
            other = group.copies[group.begun]
            entry = take(self.hidden, group.rows) if other is None else group.hidden[:, other]
            group.hidden[:, group.begun] = entry
            group.begun += 1

    def _check(self, hidden: Tensor, read: Tensor, d: int, group: Group | None = None) -> None:
        """See ``finite.check_hidden``; ``hidden`` is the output of layer ``d``, of the full stream or of a group."""
        stream = "" if group is None else f", with visual tokens changed ({group.kind}),"
        check_hidden(hidden, read, self.name, f"the output of layer {d}{stream} is")

    def _mask(self, d: int) -> Tensor | None:
        return self._masks[id(self.capture.kwargs[d].get("attention_mask"))]

    def _full(self, d: int, layer: nn.Module) -> KeysValues:
        """Run the full stream through the layer and return the keys and values its attention read."""
        kept: list[Tensor] = []
        entry = self.hidden

        def keep(keys: Tensor, values: Tensor) -> KeysValues:
            kept.extend((keys, values))
            return keys, values

        self.hidden = _run(layer, entry, self.capture.kwargs[d], keep)
        self._check(self.hidden, self.capture.attended, d)
        keys, values = kept
        if self.probes:
            self._probe(d, layer, entry, take(self.hidden, self.rows), keys, values)
        return keys, values

    def _probe(
        self, d: int, layer: nn.Module, entry: Tensor, out: Tensor, keys: Tensor, values: Tensor
    ) -> None:
        """Show layer ``d`` to the probes; arguments as the fields of ``LayerView``."""
        seen, number = self.capture, self.number
        view = LayerView(
            number, d, layer, seen.visual, seen.attended, self.rows, entry, out, keys, values, self
        )
        for probe in self.probes:
            probe(view)

    def _last(self, d: int, layer: nn.Module) -> None:
        """The last layer: keys and values of all rows, all the rest for the compared rows only."""
        entry = self.hidden
        keys, values = _keys_values(layer, entry, self.capture.kwargs[d])
        allowed = readable(self._mask(d), self.rows, entry.shape[1])
        kwargs = self._row_kwargs(d, self.rows, 1, allowed)
        self.hidden = _run(layer, take(entry, self.rows), kwargs, lambda *_: (keys, values))
        attended = self.capture.attended.gather(1, self.rows)
        self._check(self.hidden, attended, d)
        self._probe(d, layer, entry, self.hidden, keys, values)
        for group in self.groups:
            place, there = group.find(self.rows)
            self._advance(group, d, layer, keys, values, place)
            self._check(group.hidden[:, : group.begun], (there & attended)[:, None], d, group)

    def _row_kwargs(self, d: int, rows: Tensor, times: int, allowed: Tensor) -> dict[str, Any]:
        """The layer's arguments for ``times`` copies of ``rows`` [B, Q] under a bool mask [B, times*Q, n]."""
        kwargs = dict(self.capture.kwargs[d])
        embeddings, positions = kwargs.get("position_embeddings"), kwargs.get("position_ids")
        if isinstance(embeddings, Tensor):
            kwargs["position_embeddings"] = _rotary(embeddings, rows, times)
        elif embeddings is not None:
            kwargs["position_embeddings"] = tuple(_rotary(x, rows, times) for x in embeddings)
        if positions is not None:
            index = rows[(None,) * (positions.ndim - 2)]
            kwargs["position_ids"] = torch.cat([positions.take_along_dim(index, -1)] * times, dim=-1)
        kwargs["attention_mask"] = explicit(allowed[:, None], self.eager, self.hidden.dtype)
        return kwargs

    def _patterns(self, group: Group, d: int, query: Tensor | None) -> tuple[_Pattern, _Pattern]:
        """What a stream of the group may read in layer ``d`` where its intervention is not active, and where it is."""
        key = (id(self.capture.kwargs[d].get("attention_mask")), query is None)
        if key not in group.patterns:
            visual, length = self.capture.visual, self.capture.hidden.shape[1]
            rows = group.rows if query is None else group.rows.gather(1, query)
            base = readable(self._mask(d), rows, length)
            columns = group.rows[:, None, :].expand(-1, rows.shape[1], -1)
            own = base.gather(2, columns) & group.valid[:, None, :]
            full = base & ~group.reached[:, None, :]
            text = ~visual.gather(1, rows)[:, :, None]
            unread = group.kind != "freeze"
            blind_own = own & ~(text & group.visual_rows[:, None, :]) if unread else own
            blind_full = full & ~(text & visual[:, None, :]) if unread else full
            group.patterns[key] = (
                _Pattern(own, full, _reach(full)),
                _Pattern(blind_own, blind_full, _reach(blind_full)),
            )
        return group.patterns[key]

    def _advance(
        self,
        group: Group,
        d: int,
        layer: nn.Module,
        keys: Tensor,
        values: Tensor,
        query: Tensor | None = None,
    ) -> None:
        """Run a group's begun streams through layer ``d``, a chunk of them as one sequence.

        Args:
            keys, values: the full stream's in this layer, [B, H, S, E].
            query: which of the reached rows to compute, [B, R] indices into them; None means all.
        """
        batch, _, count, width = group.hidden.shape
        patterns = self._patterns(group, d, query)
        active = [one.active(d) for one in group.members[: group.begun]]
        chunk = max(1, min(group.begun, _CHUNK_ROWS // (batch * count)))
        reach = max((patterns[a].reach for a in active), default=0)
        shared = _Shared(chunk * count, keys[:, :, :reach], values[:, :, :reach])
        results = group.hidden
        if query is not None:
            results = group.hidden.new_empty(batch, len(group.members), query.shape[1], width)
        for start in range(0, group.begun, chunk):
            part = slice(start, min(start + chunk, group.begun))
            entry, streams = group.hidden[:, part], part.stop - start
            read = [patterns[a] for a in active[part]]
            reach = max(pattern.reach for pattern in read)
            mask = _diagonal([p.own for p in read], [p.full[:, :, :reach] for p in read])
            folded = entry.reshape(batch, streams * count, width)
            rows, own = group.rows, None
            if query is not None:
                own = _keys_values(layer, folded, self._row_kwargs(d, rows, streams, mask[:, :0]))
                rows = rows.gather(1, query)
                folded = entry.gather(2, query[:, None, :, None].expand(-1, streams, -1, width)).flatten(1, 2)
            out = _run(layer, folded, self._row_kwargs(d, rows, streams, mask), shared.reader(reach, own))
            out = out.view(batch, streams, -1, width)
            if group.kind == "freeze" and query is None:  # compared rows are text
                frozen = torch.tensor(active[part], device=out.device)[:, None, None]
                out = torch.where(frozen & group.visual_rows[:, None, :, None], entry, out)
            results[:, part] = out
        group.hidden = results


def _reach(columns: Tensor) -> int:
    """One more than the last column that any row of ``columns`` [B, Q, S] reads."""
    used = columns.flatten(0, 1).any(0).nonzero()
    return int(used[-1]) + 1 if len(used) else 0


def _check_arguments(capture: Capture) -> None:
    """Refuse layers that are handed something per position which the walk would not cut to the rows it runs."""
    length = capture.hidden.shape[1]
    for kwargs in capture.kwargs:
        for name, value in kwargs.items():
            if name in ("attention_mask", "position_embeddings", "position_ids"):
                continue
            for x in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(x, Tensor) and length > 1 and length in x.shape:
                    raise VtwError(f"the sweep does not understand the layer argument {name!r}")
