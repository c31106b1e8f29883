"""One sample on its way through the layers under many schedules at once.

What a schedule has done to the visual tokens by some layer is a *state*. Schedules that have done the same so far share
theirs; where they part, each part begins as a copy of the state's rows at the entry of that layer. So states form a
trie, and each of its edges is walked once.

A state walks only the rows that are no longer the full model's: those that read what was done, those that read them,
and so on. All others it reads from the full stream. Of kept visual tokens those in front of the first that left are
among the others, since attention is causal. What starts where, and which tokens stay, is decided by the runtime's own
code, from numbers that the state's last row of the prompt gives in the layer before.

Rows of several states run as one sequence under a block-diagonal mask. Rotary embeddings are in the keys already, so
the order of the columns is free: ghosts, the states' own, the full stream's.

Axes in the comments: S sequence, M states, Q rows of a state, T rows of a chunk, R compared rows, D width, H heads of
keys and values, E their width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from vtwcli.runtime.call import Call
from vtwcli.runtime.plan import Plan
from vtwcli.runtime.scores import last_row_numbers
from vtwcli.runtime.trace import SampleTrace, traced
from vtwcli.sweep.caches import KeysValues, Lent, keys_values, run
from vtwcli.sweep.layers import Capture
from vtwcli.sweep.layouts import NOTHING, Effects, Layout, Layouts, Pattern, effects_of
from vtwcli.sweep.reach import readable
from vtwcli.sweep.stream import Stream
from vtwcli.sweep.views import check_values, row_weights

# Rows of states that run as one sequence, by width: reading wide layers' weights costs more than a larger mask.
_CHUNK_ROWS = {0: 384, 2048: 768}
_CHUNK_STATES = 8  # states whose last rows are looked at together
_CHUNK_VALUES = 1 << 22  # values that are scored together: larger buffers come page by page from the system


@dataclass(eq=False)
class State:
    """What some schedules have made of the sample.

    Attributes:
        layout: which rows exist, and which are changed.
        effects: what acts in the layer at hand.
        hidden: the changed rows at the layer's entry, [Q, D]; behind the last layer those that are compared.
        asked: whether the last row's numbers in this layer decide something.
        last: the prompt's last row at the layer's entry, [D], where it is asked for.
        own: keys and values of the changed rows in this layer, [1, H, Q, E], where it is asked for.
        numbers: scores of the prompt's positions in the layer before, [1, prompt].
        lent: keys and values of the changed rows for later layers, [1, H, Q, E].
    """

    layout: Layout
    effects: Effects
    hidden: Tensor
    asked: bool = False
    last: Tensor | None = None
    own: KeysValues | None = None
    numbers: dict[str, Tensor] | None = None
    lent: Lent = field(default_factory=Lent)


class Trie(Stream):
    """One sample between the layers. Call ``step`` for each layer in order, then read ``states`` and ``traces``.

    Args:
        capture: of a batch of one.
        rows: positions to be compared, [1, R]; the first is the prompt's last.
        plans: the schedules.
        number, eager, name: see ``Stream``.

    Attributes:
        states: that of each schedule.

    Raises:
        NotFoundError: hidden states that are not finite; names the sample, the layer and the type.
    """

    def __init__(
        self,
        number: int,
        capture: Capture,
        rows: Tensor,
        plans: Sequence[Plan],
        eager: bool,
        name: str = "the sample",
    ) -> None:
        super().__init__(number, capture, rows, eager, name)
        self.prompt = int(rows[0, 0]) + 1
        visual, attended = capture.visual[0], capture.attended[0]
        asks, real = (x[None, : self.prompt].cpu() for x in (visual, attended))
        sees = bool(asks.any())
        self.calls = [Call(plan, asks if sees else None, real, (1, self.prompt)) for plan in plans]
        self._effects = [effects_of(plan) for plan in plans]
        kind = torch.zeros_like(visual, dtype=torch.int8)
        if sees and self.calls:
            kind[: self.prompt] = self.calls[0].kind[0].to(kind.device)
        self.layouts = Layouts(self.masks, attended, visual, kind, self.prompt, self.rows[0])
        root = State(self.layouts.root, NOTHING, self.hidden[0, :0])
        self.states = [root] * len(plans)

    def step(self, d: int, layer: nn.Module) -> None:
        """Advance all states through layer ``d``; of the last layer's output only the compared rows are computed."""
        added, last = self.enter(d), d == self.depth - 1
        if added is not None:
            for state in self._different():
                state.hidden = state.hidden + added[0, state.layout.rows]
        self._part(d)
        entry = self.hidden[0, self.prompt - 1]
        keys, values = self.end(d, layer) if last else self.through(d, layer)
        self._advance(d, layer, keys, values, last)
        self._look(d, layer, entry, keys, values)

    def traces(self) -> list[SampleTrace]:
        """What each schedule did; behind the last layer."""
        return [traced(call).samples[0] for call in self.calls]

    def _different(self) -> list[State]:
        """Each state once."""
        return list(dict.fromkeys(self.states))

    def _part(self, d: int) -> None:
        """Let schedules do what they do at the entry of layer ``d``: those that still agree go on as one state."""
        children: dict[tuple[int, bytes, Effects], State] = {}
        before, self.states = self.states, []
        for state, call, effects in zip(before, self.calls, self._effects, strict=True):
            call.probe = state.numbers if call.visual is not None and d and call.probes(d - 1) else None
            call.rows(d, torch.device("cpu"))
            if call.visual is None:
                self.states.append(state)
                continue
            name = (id(state), call.present.numpy().tobytes(), effects[d])
            if name not in children:
                children[name] = self._child(state, call.present[0], *name[1:])
            self.states.append(children[name])
            children[name].asked |= call.probes(d)

    def _child(self, state: State, stays: Tensor, key: bytes, effects: Effects) -> State:
        """A state at the entry of a layer, as a schedule has it go on from one that it was in.

        Args:
            stays: which rows of the prompt exist from here on, [prompt].
            key: stands for them.
        """
        present = state.layout.present.clone()
        present[: self.prompt] = stays.to(present.device)
        effects = self.layouts.acting(effects, present)
        layout = self.layouts.behind(state.layout, key, present, effects)
        hidden, (there, place) = state.hidden, state.layout.find(layout.rows)
        if layout is not state.layout:
            hidden = self.hidden[0, layout.rows]
            hidden[there] = state.hidden[place]

        def lent(kind: str, full: KeysValues) -> KeysValues:
            keys, values = (x[:, :, layout.rows] for x in full)
            if kind in state.lent:
                keys[:, :, there], values[:, :, there] = (x[:, :, place] for x in state.lent[kind])
            return keys, values

        return State(layout, effects, hidden, lent=self.lent.made(lent))

    def _advance(self, d: int, layer: nn.Module, keys: Tensor, values: Tensor, last: bool) -> None:
        """Run all states through layer ``d``, several as one sequence; arguments as of ``_run``."""
        mask = id(self.capture.kwargs[d].get("attention_mask"))
        ready: dict[bool, list[tuple[State, Pattern]]] = {False: [], True: []}
        for state in self._different():
            if state.asked:
                there, place = state.layout.find(torch.tensor([self.prompt - 1], device=state.hidden.device))
                state.last = state.hidden[place[0]] if bool(there) else None
            if len(state.layout.rows):
                pattern = self.layouts.pattern(state.layout, state.effects, mask, last)
                ready[pattern.query is not None].append((state, pattern))
        most = max(rows for width, rows in _CHUNK_ROWS.items() if width <= self.hidden.shape[-1])
        for part in ready.values():
            for chunk in _chunks(part, most):
                self._run(d, layer, chunk, keys, values, last)

    def _run(
        self,
        d: int,
        layer: nn.Module,
        chunk: Sequence[tuple[State, Pattern]],
        keys: Tensor,
        values: Tensor,
        last: bool,
    ) -> None:
        """Run states through layer ``d`` as one sequence.

        Args:
            keys, values: the full stream's in this layer, [1, H, S, E].
            last: whether only the rows that run are wanted of it.
        """
        sizes = [len(state.layout.rows) for state, _ in chunk]
        starts = [sum(sizes[:m]) for m in range(len(chunk))]
        rows = torch.cat([state.layout.rows for state, _ in chunk])[None]
        entry = torch.cat([state.hidden for state, _ in chunk])[None]
        reach = max(pattern.reach for _, pattern in chunk)
        joined = _Joined((keys, values), reach, self._ghosts(chunk, sizes))
        if joined.ghosts is not None:
            check_values(layer, values)
        mask = _mask([pattern for _, pattern in chunk], sizes, reach)[None]
        some = [pattern.query for _, pattern in chunk if pattern.query is not None]
        running = slice(None) if not some else torch.cat([q + n for q, n in zip(some, starts, strict=False)])
        lent = [entries for state, _ in chunk if (entries := state.lent.get(layer)) is not None]
        if lent:
            own_keys, own_values = (torch.cat(x, 2) for x in zip(*lent, strict=True))
            joined.own = own_keys, own_values
        elif some:
            joined.own = keys_values(layer, entry, self.arguments(d, rows, mask[:, :0]))
        out = entry[:, running]
        if out.shape[1]:
            own = joined.own if lent else None
            out = run(layer, out, self.arguments(d, rows[:, running], mask), joined, own)
            self.check(out, torch.ones(out.shape[:2], dtype=torch.bool), d, ", with visual tokens changed,")
        if some and not last:  # frozen rows stay what they are
            entry = entry.clone()
            entry[:, running] = out
            out = entry
        outs = out[0].split([len(pattern.own) for _, pattern in chunk] if last else sizes)
        assert joined.own is not None
        parts = [x.split(sizes, 2) for x in joined.own]
        for (state, _), hidden, *mine in zip(chunk, outs, *parts, strict=True):
            state.hidden = hidden
            state.lent.put(layer, (mine[0], mine[1]))
            state.own = (mine[0], mine[1]) if state.asked else None

    def _ghosts(
        self, chunk: Sequence[tuple[State, Pattern]], sizes: Sequence[int]
    ) -> tuple[Tensor, Tensor] | None:
        """Which columns give ghosts their keys and values, of the chunk's own with the full stream's behind; -1: 0."""
        if not any(len(pattern.keys) for _, pattern in chunk):
            return None
        start, total = 0, sum(sizes)
        keys: list[Tensor] = []
        values: list[Tensor] = []
        for (state, pattern), size in zip(chunk, sizes, strict=True):
            for positions, into in ((pattern.keys, keys), (pattern.values, values)):
                at = positions.clamp(min=0)
                column = torch.where(state.layout.changed[at], start + state.layout.place[at], total + at)
                into.append(column.masked_fill(positions < 0, -1))
            start += size
        return torch.cat(keys), torch.cat(values)

    def _look(self, d: int, layer: nn.Module, entry: Tensor, keys: Tensor, values: Tensor) -> None:
        """Take the last row's numbers in layer ``d`` for the states that decide by them.

        Args:
            entry: the full stream's last row of the prompt at the layer's entry, [D].
            keys, values: as of ``_run``.
        """
        asked = [state for state in self._different() if state.asked]
        if asked:
            check_values(layer, values)
        last = torch.tensor([[self.prompt - 1]], device=entry.device)
        allowed = readable(self.mask(d), last, keys.shape[2])[0]
        few = max(1, _CHUNK_VALUES // values[:, :, : self.prompt].numel())
        for at in range(0, len(asked), _CHUNK_STATES):
            part = asked[at : at + _CHUNK_STATES]
            read = [
                x[:, :, : self.prompt].repeat(len(part), 1, 1, 1) for x in (keys, values)
            ]  # [M, H, prompt, E]
            for m, state in enumerate(part):
                rows = state.layout.rows[state.layout.rows < self.prompt]
                for mine, x in zip(state.own or (), read, strict=False):
                    x[m, :, rows] = mine[0, :, : len(rows)]
            present = torch.stack([state.layout.present for state in part])[:, None]
            hidden = torch.stack([entry if state.last is None else state.last for state in part])[:, None]
            mask = (allowed & present)[:, :, : self.prompt]
            kwargs = self.arguments(d, last, mask, eager=True)
            weights = row_weights(layer, hidden, kwargs, *read)[:, :, 0]
            scored = [last_row_numbers(*x) for x in zip(weights.split(few), read[1].split(few), strict=True)]
            for m, state in enumerate(part):
                here = slice(m % few, m % few + 1)
                state.numbers = {name: x[here].cpu() for name, x in scored[m // few].items()}


class _Joined:
    """What a chunk reads: ghosts, the chunk's own keys and values, those of the full stream.

    Args:
        full: the full stream's keys and values, [1, H, S, E].
        reach: how many of its columns are read.
        ghosts: see ``Trie._ghosts``.

    Attributes:
        own: keys and values of the chunk's rows [1, H, T, E], where they are known; else those that a layer hands over.
    """

    def __init__(self, full: KeysValues, reach: int, ghosts: tuple[Tensor, Tensor] | None) -> None:
        self.full, self.reach, self.ghosts = full, reach, ghosts
        self.own: KeysValues | None = None

    def __call__(self, keys: Tensor, values: Tensor) -> KeysValues:
        """As a cache's function."""
        self.own = self.own or (keys, values)
        (keys, values), (full_keys, full_values) = self.own, self.full
        near = slice(self.reach)
        if self.ghosts is None:
            return (
                torch.cat([keys, full_keys[:, :, near]], 2),
                torch.cat([values, full_values[:, :, near]], 2),
            )
        key_of, value_of = self.ghosts
        all_keys, all_values = torch.cat([keys, full_keys], 2), torch.cat([values, full_values], 2)
        lent = all_values[:, :, value_of.clamp(min=0)].masked_fill((value_of < 0)[:, None], 0)
        end = keys.shape[2] + self.reach
        return (
            torch.cat([all_keys[:, :, key_of], all_keys[:, :, :end]], 2),
            torch.cat([lent, all_values[:, :, :end]], 2),
        )


def _chunks(states: Sequence[tuple[State, Pattern]], most: int) -> Iterator[list[tuple[State, Pattern]]]:
    """States in order, as many together as have at most so many rows."""
    chunk: list[tuple[State, Pattern]] = []
    total = 0
    for pair in states:
        count = len(pair[0].layout.rows)
        if chunk and total + count > most:
            yield chunk
            chunk, total = [], 0
        chunk.append(pair)
        total += count
    if chunk:
        yield chunk


def _mask(patterns: Sequence[Pattern], sizes: Sequence[int], reach: int) -> Tensor:
    """Who may read whom in a chunk, bool [T', G + T + reach]: of the ghosts and the own columns each state its own."""
    ghosts, total = sum(p.ghost.shape[1] for p in patterns), sum(sizes)
    mask = patterns[0].own.new_zeros(sum(len(p.own) for p in patterns), ghosts + total + reach)
    row, ghost, own = 0, 0, ghosts
    for pattern, size in zip(patterns, sizes, strict=True):
        below = slice(row, row + len(pattern.own))
        mask[below, ghost : ghost + pattern.ghost.shape[1]] = pattern.ghost
        mask[below, own : own + size] = pattern.own
        mask[below, ghosts + total :] = pattern.full[:, :reach]
        row, ghost, own = below.stop, ghost + pattern.ghost.shape[1], own + size
    return mask
