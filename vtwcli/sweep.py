"""The sweep: one pass over the layers that evaluates many interventions on visual tokens at once.

Attention decides which rows an intervention can reach: those that read what it changes, those that read them, and
so on. All other rows are the full model's at every layer. So the full stream walks the layers once, and beside it
walk only the reached rows of each begun intervention (under causal attention the *suffix*), which read the
untouched rows' keys and values from the full stream, shared and not copied. An intervention that starts at layer
k begins there as a copy of the full stream's rows, since until k the two runs are the same.

Axes in the comments: B batch rows, S sequence, M interventions, Q reached rows, R compared rows, D width,
H key/value heads, V vocabulary, L layers. Several interventions run as one sequence of M*Q rows under a
block-diagonal mask; rotary embeddings are in the keys already, so the order of the columns is free and the
reached rows' keys stand in front of the full stream's.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vtwcli.errors import UsageError, VtwError
from vtwcli.models.layers import Capture, LayerSource, Resident

_KINDS = ("withdraw", "mute", "freeze")
_CHUNK_ROWS = 256  # rows of begun interventions that run as one sequence
_CHUNK_LOGITS = 1 << 23  # float64 logits compared at once


@dataclass(frozen=True)
class Intervention:
    """One hypothetical change to what visual tokens do, from layer ``start`` on.

    Attributes:
        kind: ``withdraw``: from ``start`` on there are no visual tokens. ``mute``: in layers start..stop-1 text rows
            do not read visual columns, the softmax runs over the rest. ``freeze``: in layers start..stop-1 the
            layer's update of visual rows is dropped; they still serve as keys and values.
        start: first layer concerned, 0-based; L means no change at all.
        stop: first layer no longer concerned; None means to the end. ``withdraw`` has none.
    """

    kind: Literal["withdraw", "mute", "freeze"]
    start: int
    stop: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise UsageError(f"unknown intervention {self.kind!r}", f"one of {', '.join(_KINDS)}")
        if self.start < 0 or (self.stop is not None and self.stop <= self.start):
            raise UsageError(f"{self.kind} from layer {self.start} to {self.stop} is no range of layers")
        if self.kind == "withdraw" and self.stop is not None:
            raise UsageError("visual tokens that were withdrawn do not come back", "leave out stop, or use mute")

    def active(self, layer: int) -> bool:
        """Whether the change concerns ``layer``."""
        return self.start <= layer and (self.stop is None or layer < self.stop)


@dataclass(frozen=True)
class SweepItem:
    """A batch of model inputs and the rows whose next-token distributions are compared.

    Attributes:
        inputs: what the processor made: ``input_ids`` [B, S] and, where there is padding, ``attention_mask``,
            pixels and so on. B is 1 or a padded batch.
        rows: positions in the padded sequence, long [B, R]. The distribution compared is that of the next token.
        valid: which entries of ``rows`` count, bool [B, R]; None means all.
    """

    inputs: Mapping[str, Tensor]
    rows: Tensor
    valid: Tensor | None = None


@dataclass(frozen=True, eq=False)
class ItemResult:
    """What the interventions do to one sample, a row of one item's batch.

    Attributes:
        item, row: which item of the call and which row of its batch.
        kl: KL(P_pruned ‖ P_full) in nats from float64 logits, float64 [interventions, R].
        agree: whether the most likely token is the full model's, bool [interventions, R].
        top1: the full model's most likely token, long [R].
        prefix, visual, suffix: numbers of text tokens before the first visual token, of visual tokens, and of
            text tokens behind the first visual token. Without visual tokens all KL are 0.
        seconds: time spent on the item, its loading not included.
        memory: peak so far in bytes: ``rss`` and, where CUDA was used, ``cuda``.
    """

    item: int
    row: int
    kl: Tensor
    agree: Tensor
    top1: Tensor
    prefix: int
    visual: int
    suffix: int
    seconds: float
    memory: dict[str, int]


@dataclass(frozen=True)
class LayerView:
    """The full stream at one layer, for probes.

    Attributes:
        item: number of the item in the call.
        index: 0-based layer.
        layer: the stock decoder layer, ready to run.
        capture: masks, positions and visual tokens of the item.
        hidden_in, hidden_out: the layer's input and output, [B, S, D].
        keys, values: what the layer's attention read, after rotary embedding, [B, H, S, E].
        rows: the item's compared rows, [B, R].
    """

    item: int
    index: int
    layer: nn.Module
    capture: Capture
    hidden_in: Tensor
    hidden_out: Tensor
    keys: Tensor
    values: Tensor
    rows: Tensor


Probe = Callable[[LayerView], None]


def peak_memory() -> dict[str, int]:
    """Peak memory of this process in bytes: ``rss`` resident, ``cuda`` allocated by torch where CUDA was used."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    memory = {"rss": peak if sys.platform == "darwin" else peak * 1024}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        memory["cuda"] = torch.cuda.max_memory_allocated()
    return memory


@torch.no_grad()
def sweep(
    source: LayerSource,
    items: Sequence[SweepItem],
    interventions: Sequence[Intervention],
    *,
    probes: Sequence[Probe] = (),
    progress: Any = None,
    on_result: Callable[[ItemResult], None] | None = None,
) -> list[ItemResult]:
    """How far each intervention moves the next-token distributions of each sample, in one pass over the layers.

    Cost for withdrawal at every layer, with c(n) the cost of n rows in one layer: L·c(S) + Σ(L-k)·c(Q), against
    (Σk + L)·c(S) + Σ(L-k)·c(P+Q) for one run per candidate (VTW, arXiv 2405.05803, P = prefix).

    Args:
        source: a ``Resident`` model or one streamed layer by layer.
        items: samples, each alone or several as a padded batch.
        interventions: what to try; the order is that of the results.
        probes: called with a ``LayerView`` for every item and layer.
        progress: told ``advance()`` once for every item and layer.
        on_result: called with each result as soon as it exists: after each item with a resident model, at the
            end with a streamed one, whose items walk together.

    Returns:
        One result for each sample: items in order, rows of a batch in order.

    Raises:
        UsageError: an intervention starts behind the last layer, or the model cannot be swept.
        VtwError: a layer does not behave as a decoder layer with a key/value cache.
    """
    _check(interventions, source.depth)
    if source.family.no_sweep:
        raise UsageError(f"{source.family.title} cannot be swept: {source.family.no_sweep}", "use the naive search")
    results: list[ItemResult] = []
    together = range(len(items))
    for numbers in [together] if source.together else [range(i, i + 1) for i in together]:
        walks = [
            _Walk(i, items[i], seen, interventions, probes, source.eager)
            for i, seen in zip(numbers, source.captures([items[i].inputs for i in numbers]), strict=True)
        ]
        for d, layer in enumerate(source.layers()):
            for walk in walks:
                walk.step(d, layer, last=d == source.depth - 1)
                if progress is not None:
                    progress.advance()
        with source.head() as head:
            for walk in walks:
                for result in walk.results(head):
                    results.append(result)
                    if on_result is not None:
                        on_result(result)
    return results


def _check(interventions: Sequence[Intervention], depth: int) -> None:
    for one in interventions:
        if one.start > depth:
            raise UsageError(f"{one.kind} at layer {one.start}: the model has {depth} layers")


# ---------------------------------------------------------------------------------------------------------------
# Who reads whom


def _allowed(mask: Tensor | None, rows: Tensor, length: int) -> Tensor:
    """Which columns [B, Q, S] the model's own ``mask`` of a layer lets ``rows`` [B, Q] read; None is causal."""
    if mask is None:
        return torch.arange(length, device=rows.device) <= rows[:, :, None]
    index = rows[:, :, None].expand(-1, -1, length)
    return mask.expand(len(rows), -1, -1).gather(1, index)


def _readers(masks: Iterable[Tensor | None], columns: Tensor) -> Tensor:
    """Rows [B, S] that may read one of ``columns`` [B, S] in some layer."""
    found = torch.zeros_like(columns)
    for mask in masks:
        if mask is None:
            found |= columns.cummax(1).values if columns.dtype != torch.bool else columns.long().cummax(1).values.bool()
        else:
            found |= (mask & columns[:, None, :]).any(-1)
    return found


def _reached(kind: str, masks: Sequence[Tensor | None], visual: Tensor, attended: Tensor) -> Tensor:
    """Rows [B, S] whose values an intervention of this kind can change."""
    text = attended & ~visual
    if kind == "freeze":
        reached, living = visual, attended
    else:
        # withdrawn tokens are read by nobody, so what becomes of them does not matter
        living = text if kind == "withdraw" else attended
        reached = text & _readers(masks, visual)
    while True:
        more = reached | (living & _readers(masks, reached))
        if bool((more == reached).all()):
            return reached
        reached = more


def _as_bool(mask: Tensor | None) -> Tensor | None:
    """A recorded attention mask as bool [B or 1, S, S]; None stands for causal."""
    if mask is None:
        return None
    if mask.ndim != 4 or mask.shape[1] != 1:
        raise VtwError(f"the sweep does not understand an attention mask of shape {tuple(mask.shape)}")
    if mask.dtype == torch.bool:
        return mask[:, 0]
    allowed = mask == 0
    if not bool((allowed | (mask <= torch.finfo(mask.dtype).min / 2)).all()):
        raise VtwError("the sweep does not understand an attention mask that adds a bias")
    return allowed[:, 0]


# ---------------------------------------------------------------------------------------------------------------
# Caches that record and share


class _KeysKnown(Exception):
    """A layer has computed its keys and values, and nothing else of it is wanted."""


class _Cache:
    """Stands in for a key/value cache: keeps what the layer puts in and returns what it shall read."""

    def __init__(self, read: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
        self._read = read
        self.updates = 0

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Called by the layer with the keys and values [B, H, n, E] of its rows."""
        self.updates += 1
        return self._read(keys, values)

    def get_seq_length(self, *_: Any) -> int:
        """Nothing stands before the rows that run."""
        return 0


def _run(layer: nn.Module, hidden: Tensor, kwargs: dict[str, Any], read: Callable) -> Tensor:
    """The stock layer's output; its cache is ``read``."""
    cache = _Cache(read)
    out = layer(hidden, **{**kwargs, "past_key_values": cache})
    if cache.updates != 1:
        raise VtwError(f"{type(layer).__name__} asked its cache {cache.updates} times, not once")
    return (out[0] if isinstance(out, tuple) else out).to(hidden.device)


def _keys_values(layer: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Only the keys and values of the rows: the layer is left as soon as it has computed them."""
    kept: list[Tensor] = []

    def keep(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        kept.extend((keys, values))
        raise _KeysKnown

    try:
        layer(hidden, **{**kwargs, "past_key_values": _Cache(keep)})
    except _KeysKnown:
        return kept[0], kept[1]
    raise VtwError(f"{type(layer).__name__} did not ask its cache")


class _Shared:
    """One buffer of keys and values that all chunks of a layer read: [own rows | the full stream's columns]."""

    def __init__(self, own: int, keys: Tensor, values: Tensor) -> None:
        self.own = own
        self.keys, self.values = (
            torch.cat([x.new_empty(*x.shape[:2], own, x.shape[3]), x], dim=2) for x in (keys, values)
        )

    def reader(self, reach: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """A cache function that puts a chunk's own rows right before the first ``reach`` shared columns."""

        def read(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            count = keys.shape[2]
            place, window = slice(self.own - count, self.own), slice(self.own - count, self.own + reach)
            self.keys[:, :, place], self.values[:, :, place] = keys, values
            return self.keys[:, :, window], self.values[:, :, window]

        return read


def _diagonal(own: Sequence[Tensor], full: Sequence[Tensor]) -> Tensor:
    """The mask [B, M*Q', M*Q + n] of M streams that read their own rows [B, Q', Q] and shared columns [B, Q', n]."""
    batch, rows, count = own[0].shape
    mask = own[0].new_zeros(batch, len(own), rows, len(own) * count + full[0].shape[2])
    for m in range(len(own)):
        mask[:, m, :, m * count : (m + 1) * count] = own[m]
        mask[:, m, :, len(own) * count :] = full[m]
    return mask.flatten(1, 2)


def _take(hidden: Tensor, rows: Tensor) -> Tensor:
    """Rows [B, Q] of a stream [B, S, D]: [B, Q, D]."""
    return hidden.gather(1, rows[:, :, None].expand(-1, -1, hidden.shape[2]))


def _rotary(embedding: Tensor, rows: Tensor, times: int) -> Tensor:
    """``times`` copies, one behind the other, of a rotary embedding [..., B or 1, S, E] at ``rows`` [B, Q]."""
    return torch.cat([embedding.take_along_dim(rows[:, :, None], -2)] * times, dim=-2)


# ---------------------------------------------------------------------------------------------------------------
# The walk


class _Group:
    """All interventions of one kind on one item: the same rows are reached, the layers differ."""

    def __init__(
        self, members: list[tuple[int, Intervention]], capture: Capture, masks: Sequence[Tensor | None]
    ) -> None:
        self.kind = members[0][1].kind
        members = sorted(members, key=lambda pair: pair[1].start)  # the begun ones are the first
        self.numbers = [number for number, _ in members]
        self.members = [one for _, one in members]
        reached = _reached(self.kind, masks, capture.visual, capture.attended)
        self.reached = reached
        counts = reached.sum(1)
        self.count = int(counts.max())
        # the reached positions of each row in order, short rows filled up with positions that are masked
        self.rows = reached.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, : self.count]  # [B, Q]
        self.valid = torch.arange(self.count, device=reached.device) < counts[:, None]
        self.visual_rows = capture.visual.gather(1, self.rows)
        batch, _, width = capture.hidden.shape
        self.hidden = capture.hidden.new_empty(batch, len(members), self.count, width)  # [B, M, Q, D]
        self.begun = 0
        self.patterns: dict[tuple[int, bool], dict[bool, tuple[Tensor, Tensor, int]]] = {}

    def find(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Where ``positions`` [B, R] are among the reached rows: index [B, R], and whether they are there at all."""
        same = (self.rows[:, None, :] == positions[:, :, None]) & self.valid[:, None, :]
        return same.long().argmax(-1), same.any(-1)


class _Walk:
    """One item on its way through the layers: the full stream and the streams of all begun interventions."""

    def __init__(
        self,
        number: int,
        item: SweepItem,
        capture: Capture,
        interventions: Sequence[Intervention],
        probes: Sequence[Probe],
        eager: bool,
    ) -> None:
        self.seconds = 0.0
        began = time.perf_counter()
        self.number, self.item, self.capture, self.probes = number, item, capture, probes
        self.interventions = interventions
        self.hidden = capture.hidden
        device = self.hidden.device
        self.rows = item.rows.to(device)
        self.depth = len(capture.kwargs)
        self._masks: dict[int, Tensor | None] = {}
        self.eager = eager
        _understood(capture)
        for kwargs in capture.kwargs:
            given = kwargs.get("attention_mask")
            if id(given) not in self._masks:
                self._masks[id(given)] = _as_bool(given)
        masks = list(self._masks.values())
        kinds = dict.fromkeys(one.kind for one in interventions)
        groups = [
            _Group([(i, one) for i, one in enumerate(interventions) if one.kind == kind], capture, masks)
            for kind in kinds
        ]
        self.groups = [group for group in groups if group.count]
        self.seconds += time.perf_counter() - began

    def step(self, d: int, layer: nn.Module, last: bool) -> None:
        """Advance all streams through layer ``d``; the last layer computes the compared rows only."""
        began = time.perf_counter()
        added = self.capture.added.get(d)
        if added is not None:
            self.hidden = self.hidden + added
        for group in self.groups:
            self._begin(group, d, added)
        if last:
            self._last(d, layer)
        else:
            entry = self.hidden
            keys, values = self._full(d, layer)
            self._probe(d, layer, entry, keys, values)
            for group in self.groups:
                self._advance(group, d, layer, keys, values)
        self.seconds += time.perf_counter() - began

    def _begin(self, group: _Group, d: int, added: Tensor | None) -> None:
        """Give begun streams what the model adds before layer ``d``, then start those whose layer has come."""
        if added is not None and group.begun:
            group.hidden[:, : group.begun] += _take(added, group.rows)[:, None]
        while group.begun < len(group.members) and group.members[group.begun].start == d:
            group.hidden[:, group.begun] = _take(self.hidden, group.rows)
            group.begun += 1

    def _mask(self, d: int) -> Tensor | None:
        return self._masks[id(self.capture.kwargs[d].get("attention_mask"))]

    def _full(self, d: int, layer: nn.Module) -> tuple[Tensor, Tensor]:
        """Run the full stream through the stock layer and return the keys and values its attention read."""
        kept: list[Tensor] = []

        def keep(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            kept.extend((keys, values))
            return keys, values

        self.hidden = _run(layer, self.hidden, self.capture.kwargs[d], keep)
        return kept[0], kept[1]

    def _last(self, d: int, layer: nn.Module) -> None:
        """The last layer: keys and values of all rows, the rest of the layer for the compared rows only."""
        kwargs, entry = self.capture.kwargs[d], self.hidden
        if self.probes:
            keys, values = self._full(d, layer)
            self._probe(d, layer, entry, keys, values)
        else:
            keys, values = _keys_values(layer, entry, kwargs)
        allowed = _allowed(self._mask(d), self.rows, entry.shape[1])
        some = self._row_kwargs(d, self.rows, 1, allowed)
        self.hidden = _run(layer, _take(entry, self.rows), some, lambda *_: (keys, values))
        for group in self.groups:
            self._advance(group, d, layer, keys, values, group.find(self.rows)[0])
        added = self.capture.added.get(self.depth)
        if added is not None:
            self.hidden = self.hidden + _take(added, self.rows)
            for group in self.groups:
                group.hidden = group.hidden + _take(added, self.rows)[:, None]

    def _row_kwargs(self, d: int, rows: Tensor, times: int, allowed: Tensor) -> dict[str, Any]:
        """The layer's arguments for ``times`` copies of ``rows`` [B, Q] under an explicit mask [B, times*Q, n]."""
        kwargs = dict(self.capture.kwargs[d])
        embeddings, positions = kwargs.get("position_embeddings"), kwargs.get("position_ids")
        if isinstance(embeddings, Tensor):
            kwargs["position_embeddings"] = _rotary(embeddings, rows, times)
        elif embeddings is not None:
            kwargs["position_embeddings"] = tuple(_rotary(x, rows, times) for x in embeddings)
        if positions is not None:
            kwargs["position_ids"] = torch.cat([positions.take_along_dim(rows, -1)] * times, dim=-1)
        mask = allowed[:, None]
        if self.eager:  # its softmax adds the mask
            dtype = self.hidden.dtype
            mask = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)
        kwargs["attention_mask"] = mask
        return kwargs

    def _patterns(self, group: _Group, d: int, query: Tensor | None) -> dict[bool, tuple[Tensor, Tensor, int]]:
        """What one stream of a group may read in layer ``d``, for streams whose intervention is not active / active.

        Returns:
            For each of the two: own columns bool [B, Q', Q], the full stream's columns bool [B, Q', S], and how
            many of the latter can be left out at the end.
        """
        key = (id(self.capture.kwargs[d].get("attention_mask")), query is None)
        known = group.patterns.get(key)
        if known is None:
            visual, length = self.capture.visual, self.capture.hidden.shape[1]
            index = torch.arange(group.count, device=visual.device).expand_as(group.rows) if query is None else query
            rows = group.rows.gather(1, index)
            base = _allowed(self._mask(d), rows, length)
            own = base.gather(2, group.rows[:, None, :].expand(-1, rows.shape[1], -1)) & group.valid[:, None, :]
            own |= index[:, :, None] == torch.arange(group.count, device=visual.device)  # no row without a column
            full = base & ~group.reached[:, None, :]
            known = {}
            for active in (False, True):
                if active and group.kind != "freeze":
                    text = ~visual.gather(1, rows)[:, :, None]
                    own = own & ~(text & group.visual_rows[:, None, :])
                    full = full & ~(text & visual[:, None, :])
                used = full.any(1).any(0).nonzero()
                known[active] = (own, full, int(used[-1]) + 1 if len(used) else 0)
            group.patterns[key] = known
        return known

    def _advance(
        self,
        group: _Group,
        d: int,
        layer: nn.Module,
        keys: Tensor,
        values: Tensor,
        query: Tensor | None = None,
    ) -> None:
        """Run a group's begun streams through layer ``d``, a chunk of them as one sequence.

        Args:
            keys, values: the full stream's in this layer, [B, H, S, E].
            query: compute only these of the reached rows, [B, R] indices into them; None means all.
        """
        if query is not None:
            after = group.hidden.new_empty(*group.hidden.shape[:2], query.shape[1], group.hidden.shape[3])
        patterns = self._patterns(group, d, query)
        batch, _, count, width = group.hidden.shape
        chunk = max(1, min(group.begun, _CHUNK_ROWS // (batch * count)))
        reach = max(patterns[one.active(d)][2] for one in group.members[: group.begun]) if group.begun else 0
        shared = _Shared(chunk * count, keys[:, :, :reach], values[:, :, :reach])
        for start in range(0, group.begun, chunk):
            members = group.members[start : min(start + chunk, group.begun)]
            part = slice(start, start + len(members))
            entry = group.hidden[:, part]
            active = [one.active(d) for one in members]
            reads = max(patterns[a][2] for a in active)
            mask = _diagonal([patterns[a][0] for a in active], [patterns[a][1][:, :, :reads] for a in active])
            folded = entry.reshape(batch, len(members) * count, width)
            if query is None:
                kwargs = self._row_kwargs(d, group.rows, len(members), mask)
                out = _run(layer, folded, kwargs, shared.reader(reads))
                out = out.view(batch, len(members), count, width)
                if group.kind == "freeze":
                    frozen = torch.tensor(active, device=out.device)[:, None, None] & group.visual_rows[:, None, :, None]
                    out = torch.where(frozen, entry, out)
                group.hidden[:, part] = out
            else:
                own = _keys_values(layer, folded, self._row_kwargs(d, group.rows, len(members), mask[:, :0]))
                rows = group.rows.gather(1, query)
                some = entry.gather(2, query[:, None, :, None].expand(-1, len(members), -1, width))
                kwargs = self._row_kwargs(d, rows, len(members), mask)
                out = _run(layer, some.flatten(1, 2), kwargs, lambda *_, own=own: shared.reader(reads)(*own))
                after[:, part] = out.view(batch, len(members), -1, width)
        if query is not None:
            group.hidden = after

    def _probe(self, d: int, layer: nn.Module, entry: Tensor, keys: Tensor, values: Tensor) -> None:
        for probe in self.probes:
            view = LayerView(self.number, d, layer, self.capture, entry, self.hidden, keys, values, self.rows)
            probe(view)

    def results(self, head: Callable[[Tensor], Tensor]) -> Iterator[ItemResult]:
        """Compare every stream's distributions at the compared rows with the full stream's."""
        for b in range(len(self.rows)):
            began = time.perf_counter()
            valid = self.item.valid
            keep = torch.ones_like(self.rows[b], dtype=torch.bool) if valid is None else valid[b].to(self.rows.device)
            full = _log_softmax(head(self.hidden[b, keep]))  # [R, V]
            top1 = full.argmax(-1)
            kl = torch.zeros(len(self.interventions), len(full), dtype=torch.float64)
            agree = torch.ones(len(self.interventions), len(full), dtype=torch.bool)
            step = max(1, _CHUNK_LOGITS // max(1, full.numel()))
            for group in self.groups:
                there = group.find(self.rows)[1][b, keep]
                for start in range(0, group.begun, step):
                    some = slice(start, min(start + step, group.begun))
                    streams = group.hidden[b, some][:, keep]  # [M, R, D]
                    pruned = _log_softmax(head(streams.flatten(0, 1))).unflatten(0, streams.shape[:2])
                    distance = (pruned.exp() * (pruned - full)).sum(-1)
                    numbers = torch.tensor(group.numbers[some])
                    kl[numbers] = torch.where(there, distance, 0.0).cpu()
                    agree[numbers] = ((pruned.argmax(-1) == top1) | ~there).cpu()
            prefix, visual, suffix = _counts(self.capture.visual[b], self.capture.attended[b])
            share = self.seconds / len(self.rows) + time.perf_counter() - began
            yield ItemResult(
                self.number, b, kl, agree, top1.cpu(), prefix, visual, suffix, share, peak_memory()
            )


def _log_softmax(logits: Tensor) -> Tensor:
    """Log-probabilities in float64; on the CPU where a device has no float64."""
    return (logits.cpu() if logits.device.type == "mps" else logits).double().log_softmax(-1)


def _counts(visual: Tensor, attended: Tensor) -> tuple[int, int, int]:
    """Numbers of prefix, visual and suffix tokens of one row [S]."""
    text = attended & ~visual
    before = visual.long().cumsum(0) == 0
    return int((text & before).sum()), int(visual.sum()), int((text & ~before).sum())


def _understood(capture: Capture) -> None:
    """Refuse layers that are handed something per position which the walk would not cut to the rows it runs."""
    length = capture.hidden.shape[1]
    for name, value in capture.kwargs[0].items():
        if name in ("attention_mask", "position_embeddings", "position_ids"):
            continue
        for x in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(x, Tensor) and length > 1 and length in x.shape:
                raise VtwError(f"the sweep does not understand the layer argument {name!r}")
