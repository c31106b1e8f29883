"""One forward pass: who is present, what was decided, and what each layer is given."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import replace
from typing import Any

import torch

from vtwcli.runtime.cache import Columns
from vtwcli.runtime.contract import attention_kind, strange
from vtwcli.runtime.masks import check_mask, flash_mask, gathered
from vtwcli.runtime.merge import Recycled, recycled
from vtwcli.runtime.picture import Front
from vtwcli.runtime.plan import Plan, PlannedAction
from vtwcli.runtime.positions import Turned, gone_at, lowering
from vtwcli.runtime.rows import TEXT, Rows, Split, Tensor, compact, split
from vtwcli.runtime.scores import best, drawn, spaced
from vtwcli.runtime.trimming import trims
from vtwcli.schedule.words import TOWER, kept_count
from vtwcli.schedule.words import row as word

NOBODY = torch.iinfo(torch.long).min  # no token's number


class Call:
    """The state of one forward pass: a prompt, a chunk of one, or a decode step.

    Token indices count from the start of the chunk. Decisions are remembered per layer, so a layer that is run
    again by gradient checkpointing finds what it found before.
    """

    def __init__(
        self,
        plan: Plan,
        visual: Tensor | None,
        real: Tensor | None,
        shape: tuple[int, int],
        places: Tensor | None = None,
    ) -> None:
        """
        Args:
            visual: which tokens are visual, [B, S]; None if none is.
            real: which tokens are not padding, [B, S]; None if all are.
            shape: (B, S).
            places: of visual tokens, where the plan looks around, [B, S, 3].
        """
        self.plan, self.visual, self.real, self.shape, self.places = plan, visual, real, shape, places
        self.memo: dict[Any, Any] = {}
        self.at: dict[int, Rows] = {}
        self.present_at: list[Tensor] = []
        self.rows_at: list[int] = []
        self.fired: list[Tensor] = []
        self.kept: dict[int, Tensor] = {}
        self.probe: dict[str, Tensor] | None = None
        self.scores: dict[int, Tensor] = {}
        self.entered: Tensor | None = None  # rows at the entry of the layer before, where they are compared
        self.sizes: Tensor | None = None
        self.raters: Tensor | None = None
        self.incoming: Tensor | None = None  # rows at a layer's entry, where some are merged
        self.gone: Tensor | None = None
        self.angles: list[Turned] = []
        # of all entries by position, for what leaves during the answer
        self.entry_numbers: dict[str, Tensor] = {}
        self.left: Tensor | None = None
        self.tap: Any = None  # a ``Tap``, which knows this class
        self.loans: dict[int, Any] = {}  # by layer, a ``Loan``
        self.past = 0
        self.cache: Any = None
        self.begun = 0  # how many layers have been
        self.over = False
        self.front: Front | None = None  # what was chosen before the first layer
        if visual is None:
            return
        device = visual.device
        batch, length = shape
        real = torch.ones_like(visual) if real is None else real
        visual = visual & real
        self.visual = visual
        place = torch.arange(length, device=device)
        # argmax of a row without any token would be 0; its last slot is as good
        last = (real * (place + 1)).argmax(1)
        self.last = torch.where(real.any(1), last, torch.full_like(last, length - 1))
        self.ordinal = visual.cumsum(1) - 1
        self.token = self.ordinal.clone()  # a visual token's number; merged ones have -1, -2, ...
        self.merged = torch.zeros(batch, dtype=torch.long, device=device)
        self.number = visual.sum(1)
        half = visual & (self.ordinal < (self.number // 2)[:, None])
        self.kind = visual.to(torch.int8) + half.to(torch.int8)
        self.real = real
        self.present = real.clone()
        self.is_last = real & (place[None] == self.last[:, None])
        self.stage = torch.zeros(batch, dtype=torch.long, device=device)
        self.count = torch.zeros_like(self.stage)
        self.fired = [torch.full_like(self.stage, -1) for _ in plan.leaving]

    # ------------------------------------------------------------------ who is there

    def full(self, device: torch.device) -> Rows:
        """All tokens, in place; padding is nobody's row."""
        if "full" not in self.memo:
            here = torch.ones(self.shape, dtype=torch.bool, device=device) if self.real is None else self.real
            self.memo["full"] = Rows(None, here, here, ragged=not bool(here.all()))
        return self.memo["full"]

    def rows(self, layer: int, device: torch.device) -> Rows:
        """The rows that run in ``layer``."""
        if layer not in self.at:
            self._check_tap()
            before = self.at.get(layer - 1, self.full(device))
            self.at[layer] = before if self.visual is None else self._decide(layer, before)
            self.probe = None
            if self.visual is not None:
                self.present_at.append(self.present & self.visual)
                now = self.at[layer]
                self.rows_at.append(self.shape[1] if now.index is None else now.index.shape[1])
        return self.at[layer]

    def finish(self, borrowers: Container[int] = ()) -> Rows | None:
        """After the last layer: the rows that ran in it; ``borrowers`` are layers without a cache of their own.

        Raises:
            PruningError: a layer or its attention was passed by, or a cache does not hold what the schedule says.
        """
        self._check_tap()
        if self.begun != self.plan.depth:
            raise strange(f"the model called {self.begun} of its {self.plan.depth} layers")
        self._check_cache(borrowers)
        self.tap, self.cache, self.entered, self.over = None, None, None, True
        self.memo.clear()
        return self.at.get(self.plan.depth - 1)

    def enter(self, layer: int, hidden: Any) -> None:
        """A layer begins: the ones before it must have run, and handed on the rows that they were given."""
        if self.over:
            return  # run again, by gradient checkpointing
        if layer != self.begun:
            raise strange(f"layer {layer} runs where layer {self.begun} was to run")
        self.begun += 1
        self.check_rows(layer - 1, hidden)

    def check_rows(self, layer: int, hidden: Any) -> None:
        """``hidden`` must have the rows that ran in ``layer``; -1: those of the whole chunk."""
        rows = self.at.get(layer)
        wide = self.shape[1] if rows is None or rows.index is None else rows.index.shape[1]
        if not isinstance(hidden, torch.Tensor) or hidden.ndim != 3:
            shape: Any = type(hidden).__name__
        elif tuple(hidden.shape[:2]) != (self.shape[0], wide):
            shape = list(hidden.shape)
        else:
            return
        raise strange(f"the rows behind layer {layer} are {shape}, not [{self.shape[0]}, {wide}, D]")

    def _check_tap(self) -> None:
        if self.tap is not None and (self.tap.due or self.tap.keys is None):
            raise strange(f"layer {self.tap.layer} does not call its self_attn with the cache it is given")

    def _check_cache(self, borrowers: Container[int]) -> None:
        """Every layer's cache has seen the chunk's tokens and holds the entries announced to it, no others."""
        seen = self.past + self.shape[1]
        for number, layer in enumerate(getattr(self.cache, "layers", None) or ()):
            if number >= self.plan.depth or number in borrowers:
                continue
            if getattr(layer, "awaited", False) or layer.get_seq_length() != seen:
                raise strange(
                    f"layer {number} did not put its keys and values into the cache it was given: that has seen "
                    f"{layer.get_seq_length()} of {seen} tokens"
                )

    def probes(self, layer: int) -> bool:
        """Whether the last row's attention in ``layer`` decides something."""
        if self.visual is None:
            return bool(trims(self, layer + 1))
        if not self.plan.may_probe(layer):
            return False
        return any(
            (a.at == layer + 1 and a.before)
            or (a.at is None and layer > a.after and bool((self.stage == number).any()))
            for number, a in enumerate(self.plan.leaving)
        )

    def kinds(self, rows: Rows, device: torch.device) -> Tensor:
        """Kinds of the rows' tokens, [B, T]."""
        index = self.index(rows, device)
        if self.visual is None:
            return torch.zeros_like(index, dtype=torch.int8)
        return self.kind.to(device).gather(1, index)

    def split(self, rows: Rows, device: torch.device) -> Split | None:
        """The rows of a layer in which visual ones are not updated; None if there is none."""
        key = ("split", id(rows))
        if key not in self.memo:
            visual, index = self.kinds(rows, device) != TEXT, self.index(rows, device)
            some = self.visual is not None and bool((visual & rows.query.to(device)).any())
            last = self.is_last.to(device).gather(1, index) if some else visual
            self.memo[key] = split(rows, index, visual, last) if some else None, rows
        return self.memo[key][0]

    def _decide(self, layer: int, before: Rows) -> Rows:
        """Let start what starts in ``layer``: ``stage`` counts the actions each sample has behind it."""
        assert self.visual is not None
        stage, left, moved = self.stage, False, None
        for number, action in enumerate(self.plan.leaving):
            if action.at is None:
                if self.probe is None or layer - 1 <= action.after:
                    continue
                starts = self._condition(action, stage == number)
            elif action.at == layer:
                starts = self.stage <= number
            else:
                continue
            if action.at is None and not bool(starts.any()):
                continue
            stays = self.present & ~self.visual
            if action.action == "keep":
                chosen = self._select(number, action)
                names = torch.where(chosen & starts[:, None], self.token, NOBODY)
                self.kept[number] = torch.where(starts[:, None], names, self.kept.get(number, names))
                if action.rest:
                    moved = self._recycle(number, action, before, chosen)
                    chosen = moved.present
                stays = stays | chosen
            self.present = torch.where(starts[:, None], stays, self.present)
            if action.positions == "compact":
                gone, missing = self.gone, self.visual & ~self.present
                if self.front is not None and self.front.left is not None:
                    missing &= self.front.stays  # whose positions are those of the shorter prompt already
                gone = torch.zeros_like(missing) if gone is None else gone
                self.gone = torch.where(starts[:, None], missing, gone)
            self.stage = torch.where(starts, number + 1, self.stage)
            self.count = self.count.masked_fill(starts, 0)
            self.fired[number] = self.fired[number].masked_fill(starts, layer)
            left = True
        if not left:
            return before
        return replace(compact(self.present | self.is_last, self.present), gone=self.gone, moved=moved)

    def _recycle(self, number: int, action: PlannedAction, before: Rows, chosen: Tensor) -> Recycled:
        """Merge some of the tokens that are not ``chosen``; tokens are named anew by their slots."""
        assert self.visual is not None and self.incoming is not None
        place = torch.zeros(self.shape, dtype=torch.long, device=self.visual.device)
        index = self.index(before, place.device)
        place.scatter_(1, index, torch.arange(index.shape[1], device=place.device).expand_as(index))
        there, score = self.present & self.visual, self._measured(number, action)
        said = {"rest": action.rest}
        found = recycled(said, there, chosen, self.is_last, score, self.incoming, place)
        named = torch.where(
            found.made >= 0, -1 - self.merged[:, None] - found.made, self.token.gather(1, found.origin)
        )
        self.token, self.merged = named, self.merged + (found.made >= 0).sum(1)
        return found

    def _condition(self, action: PlannedAction, awaited: Tensor) -> Tensor:
        """Rows [B] at which an ``auto`` action starts, given the layer before."""
        assert self.probe is not None and self.visual is not None
        there, cosine = self.present & self.visual, self.probe["cosine"]
        if "attention_below" in action.when:
            mass = self.probe["attention"].masked_fill(~there, 0).sum(1)
            holds = (mass < action.when["attention_below"]) & there.any(1)
        elif "cosine_below" in action.when:
            holds = ((cosine < action.when["cosine_below"]) & there).any(1)
        else:
            holds = ((cosine >= action.when["cosine_above"]) | ~there).all(1) & there.any(1)
        without = torch.zeros_like(self.count) if action.when.get("consecutive") else self.count
        self.count = torch.where(awaited, torch.where(holds, self.count + 1, without), self.count)
        return awaited & (self.count >= action.when.get("layers", 1))

    def _select(self, number: int, action: PlannedAction) -> Tensor:
        """The visual tokens [B, S] that ``keep`` keeps among those present."""
        assert self.visual is not None
        there, select = self.present & self.visual, action.select
        total = there.sum(1)
        if word("score", select["score"]).needs == TOWER:
            assert self.front is not None
            return there & self.front.stays
        if select.get("above") is not None:
            return there & (self._measured(number, action) > select["above"])
        counts = zip(total.tolist(), self.number.tolist(), strict=True)
        wanted = torch.tensor([kept_count(select, *two) for two in counts], device=total.device)
        if select["score"] == "uniform":
            return spaced(there, wanted)
        if select["score"] == "random":
            return best(drawn(self.visual, select.get("seed", 0)), there, wanted)
        return best(self._measured(number, action), there, wanted)

    def _measured(self, number: int, action: PlannedAction) -> Tensor:
        """An action's score [B, S], as a layer gave it."""
        if number in self.scores:
            return self.scores[number]
        name = action.select["score"]
        if self.probe is None:
            raise strange(f"the attention of this model gave no {name}")
        return self.probe[name]

    # ------------------------------------------------------------------ what a layer is given

    def slots(self, before: Rows, now: Rows) -> Tensor | None:
        """Where the rows of ``now`` lie among those of ``before``, [B, T]."""
        wanted = now.index
        if now.moved is not None and wanted is not None:
            wanted = now.moved.origin.to(wanted.device).gather(1, wanted)
        if before.index is None or wanted is None:
            return wanted
        place = torch.zeros(self.shape, dtype=torch.long, device=wanted.device)
        arange = torch.arange(before.index.shape[1], device=wanted.device).expand_as(before.index)
        place.scatter_(1, before.index, arange)
        return place.gather(1, wanted)

    def columns(self, old: Columns | None, rows: Rows, past: int, device: torch.device) -> Columns:
        """The entries of a cache layer once ``rows`` are added to the ``old`` ones."""
        if old is not None and not old.position.shape[1]:
            old = None  # layers that hold nothing yet get the same
        key = ("columns", id(old), id(rows), past)
        if key not in self.memo:
            index = self.index(rows, device)
            position = (index + past).masked_fill(~rows.key.to(device), -1)
            kind = self.kinds(rows, device)
            ragged, visual, until = rows.ragged, self.visual is not None, None
            if old is not None:
                position = torch.cat([old.position, position], 1)
                kind = torch.cat([old.kind, kind], 1)
                ragged, visual = ragged or old.ragged, visual or old.visual
                until = old.until_of(index.shape[1])
            absent, gone = (None, None) if old is None else (old.absent, old.gone)
            if self.front is not None and self.front.left is not None:
                absent = gone_at(self.front.left.to(device), past, absent)
            if rows.gone is not None:
                gone = gone_at(rows.gone.to(device), past, gone)
            # the memo holds what its keys are the ids of, so that no other object gets them
            self.memo[key] = Columns(position, kind, ragged, visual, absent, gone, until), old, rows
        return self.memo[key][0]

    def lowering(self, rows: Rows, old: Tensor | None) -> Tensor | None:
        """By how much positions are lower where ``rows`` run, [B, S or 1]; see ``positions.lowering``."""
        key = ("lowering", id(rows), id(old))
        if key not in self.memo:
            self.memo[key] = lowering(rows.gone, old), rows, old
        return self.memo[key][0]

    def mask(
        self,
        given: Tensor | None,
        rows: Rows,
        columns: Columns,
        past: int,
        muted: list[PlannedAction],
        hidden: Tensor,
        attention: Any,
    ) -> Tensor | None:
        """The mask for ``rows`` reading ``columns``, out of the one the model made for the whole chunk.

        Raises:
            PruningError: a mask of a form that is not known.

        Args:
            given: additive or boolean [B or 1, 1 or H, S, W], over the last W tokens seen; None: causal.
            past: tokens seen before the chunk.
            muted: actions that act before the softmax.
            hidden: hidden states, of the device and dtype wanted.
            attention: the module that gets it.
        """
        kind = attention_kind(attention)
        key = ("mask", id(given), id(rows), id(columns), tuple(map(id, muted)), kind)
        if key not in self.memo:
            real = None if self.visual is None else self.real
            check_mask(given, self.shape, past, real, attention)
            if "flash" in kind:
                window = getattr(attention, "sliding_window", None)
                mask = flash_mask(given, rows, columns, past + self.shape[1], muted, window)
            else:
                dtype = given.dtype if given is not None else hidden.dtype if kind == "eager" else torch.bool
                like, index = hidden.new_empty(0, dtype=dtype), self.index(rows, hidden.device)
                reader = self.kinds(rows, hidden.device)
                length = self.shape[1]
                around = self.places
                mask = gathered(given, rows, index, reader, columns, past, length, muted, like, around)
            self.memo[key] = mask, given, rows, columns
        return self.memo[key][0]

    def of_chunk(self, given: Any) -> Any:
        """What a model's mask says of a first chunk; a static cache has columns for what comes later too."""
        if not isinstance(given, torch.Tensor):
            return given
        key = ("of chunk", id(given))
        if key not in self.memo:
            self.memo[key] = given[..., : self.shape[1]], given
        return self.memo[key][0]

    def index(self, rows: Rows, device: torch.device) -> Tensor:
        """The token of each row, [B, T]."""
        if rows.index is not None:
            return rows.index.to(device)
        return torch.arange(self.shape[1], device=device).expand(self.shape)

    def last_row(self, rows: Rows) -> Tensor:
        """Where the last token of each sample has its row, [B]."""
        if self.visual is None:
            return torch.full(self.shape[:1], self.shape[1] - 1)
        if rows.index is None:
            return self.last
        return torch.full_like(self.last, rows.index.shape[1] - 1)
