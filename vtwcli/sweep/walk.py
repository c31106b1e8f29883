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
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from vtwcli.schedule.intervention import Intervention
from vtwcli.sweep.caches import KeysValues, Lent, Shared, keys_values, lends, run
from vtwcli.sweep.layers import Capture
from vtwcli.sweep.reach import Pattern, diagonal, reach_of, reached, readable, take
from vtwcli.sweep.stream import Stream
from vtwcli.sweep.views import Probe

_CHUNK_ROWS = 384  # rows of begun streams that run as one sequence


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
        updated: where text rows are among the reached ones, [B, T], and whether it is one, for fillers.
        hidden: their streams, [B, M, Q, D]; behind the last layer [B, M, R, D] at the compared rows.
        lent: keys and values of the begun ones for later layers, [B, H, M, Q, E].
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
        text = self.valid & ~self.visual_rows
        place = text.to(torch.int8).argsort(dim=1, descending=True, stable=True)[
            :, : max(int(text.sum(1).max()), 1)
        ]
        self.updated = place, text.gather(1, place)
        batch, _, width = capture.hidden.shape
        self.hidden = capture.hidden.new_empty(batch, len(members), self.count, width)
        self.patterns: dict[tuple[int, int | None], tuple[Pattern, Pattern]] = {}
        self.lent = Lent()

    def find(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Where ``positions`` [B, R] are among the reached rows: index [B, R], and whether they are there at all."""
        same = (self.rows[:, None, :] == positions[:, :, None]) & self.valid[:, None, :]
        return same.long().argmax(-1), same.any(-1)


class Walk(Stream):
    """One batch between the layers. Call ``step`` for each layer in order, then read ``hidden`` and ``groups``.

    Args:
        interventions: what to try.
        number, capture, rows, probes, eager, name: see ``Stream``.

    Attributes:
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
        super().__init__(number, capture, rows, eager, name, probes)
        self.groups: list[Group] = []
        for kind in dict.fromkeys(one.kind for one in interventions):
            touched = reached(kind, list(self.masks.values()), capture.visual, capture.attended)
            if touched.any():
                members = [(i, one) for i, one in enumerate(interventions) if one.kind == kind]
                self.groups.append(Group(members, capture, touched))
        self.seconds = time.perf_counter() - began

    def step(self, d: int, layer: nn.Module) -> None:
        """Advance all streams through layer ``d``; of the last layer's output only the compared rows are computed."""
        began = time.perf_counter()
        added, last = self.enter(d), d == self.depth - 1
        for group in self.groups:
            self._begin(group, d, added)
        keys, values = self.end(d, layer) if last else self.through(d, layer)
        for group in self.groups:
            place, read = None, group.valid
            if last:
                place, there = group.find(self.rows)
                read = there & self.capture.attended.gather(1, self.rows)
            self._advance(group, d, layer, keys, values, place)
            what = f", with visual tokens changed ({group.kind}),"
            self.check(group.hidden[:, : group.begun], read[:, None], d, what)
        self.seconds += time.perf_counter() - began

    def _begin(self, group: Group, d: int, added: Tensor | None) -> None:
        """Give begun streams what the model adds before layer ``d``, then start those whose layer has come."""
        if added is not None and group.begun:
            group.hidden[:, : group.begun] += take(added, group.rows)[:, None]
        while group.begun < len(group.members) and group.begins[group.begun] == d:
            other = group.copies[group.begun]
            entry = take(self.hidden, group.rows) if other is None else group.hidden[:, other]
            group.hidden[:, group.begun] = entry
            group.lent = group.lent.made(partial(self._lent_to, group, other))
            group.begun += 1

    def _lent_to(self, group: Group, other: int | None, kind: str, entries: KeysValues) -> KeysValues:
        """What one more stream of a group finds lent, behind the ``entries`` of the begun ones: what the ``other`` has
        that it is a copy of, or None for the full stream."""
        if other is not None:
            more = [x[:, :, other] for x in entries]
        else:
            index = group.rows[:, None, :, None]
            more = [x.take_along_dim(index, 2) for x in self.lent[kind]]
        keys, values = (torch.cat([x, one[:, :, None]], 2) for x, one in zip(entries, more, strict=True))
        return keys, values

    def _patterns(self, group: Group, d: int, query: Tensor | None) -> tuple[Pattern, Pattern]:
        """What a stream of the group may read in layer ``d`` where its intervention is not active, and where it is."""
        key = (id(self.capture.kwargs[d].get("attention_mask")), None if query is None else id(query))
        if key not in group.patterns:
            visual, length = self.capture.visual, self.capture.hidden.shape[1]
            rows = group.rows if query is None else group.rows.gather(1, query)
            base = readable(self.mask(d), rows, length)
            columns = group.rows[:, None, :].expand(-1, rows.shape[1], -1)
            own = base.gather(2, columns) & group.valid[:, None, :]
            full = base & ~group.reached[:, None, :]
            text = ~visual.gather(1, rows)[:, :, None]
            unread = group.kind != "freeze"
            blind_own = own & ~(text & group.visual_rows[:, None, :]) if unread else own
            blind_full = full & ~(text & visual[:, None, :]) if unread else full
            group.patterns[key] = (
                Pattern(own, full, reach_of(full)),
                Pattern(blind_own, blind_full, reach_of(blind_full)),
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
        active = [one.active(d) for one in group.members[: group.begun]]
        chunk = max(1, min(group.begun, _CHUNK_ROWS // (batch * count)))
        froze = group.kind == "freeze" and query is None  # compared rows are text
        queries = (query, group.updated[0] if froze and any(active) else query)
        patterns = [self._patterns(group, d, rows)[a] for a, rows in enumerate(queries)]
        reach = max((patterns[a].reach for a in active), default=0)
        shared = Shared(chunk * count, keys[:, :, :reach], values[:, :, :reach])
        borrowed, made = group.lent.get(layer), []
        results = group.hidden
        if query is not None:
            results = group.hidden.new_empty(batch, len(group.members), query.shape[1], width)
        for part in _chunks(active, chunk, froze):
            entry, streams = group.hidden[:, part], part.stop - part.start
            read = [patterns[a] for a in active[part]]
            reach = max(pattern.reach for pattern in read)
            mask = diagonal([p.own for p in read], [p.full[:, :, :reach] for p in read])
            folded = entry.reshape(batch, streams * count, width)
            rows, own, asked = group.rows, None, queries[active[part.start]]
            if borrowed is not None:
                own = borrowed[0][:, :, part].flatten(2, 3), borrowed[1][:, :, part].flatten(2, 3)
            if asked is not None:
                own = own or keys_values(layer, folded, self.arguments(d, rows, mask[:, :0], streams))
                rows = rows.gather(1, asked)
                place = asked[:, None, :, None].expand(-1, streams, -1, width)
                before = entry.gather(2, place)
                folded = before.flatten(1, 2)
            given = self.arguments(d, rows, mask, streams)
            out = run(layer, folded, given, shared.reader(reach, own), own if borrowed else None)
            if lends(layer):
                made.append(shared.taken(streams * count))
            out = out.view(batch, streams, -1, width)
            if froze and asked is not None:
                out = entry.scatter(2, place, torch.where(group.updated[1][:, None, :, None], out, before))
            results[:, part] = out
        group.hidden = results
        if lends(layer):
            none = [x[:, :, :0] for x in (keys, values)]
            of_all = [torch.cat(x, 2).unflatten(2, (-1, count)) for x in zip(none, *made, strict=True)]
            group.lent.put(layer, (of_all[0], of_all[1]))


def _chunks(active: Sequence[bool], size: int, apart: bool) -> Iterator[slice]:
    """Slices of at most ``size`` streams; where ``apart``, of those that are ``active`` or of those that are not."""
    start = 0
    for at in range(1, len(active) + 1):
        if at == len(active) or at - start == size or (apart and active[at] != active[start]):
            yield slice(start, at)
            start = at
