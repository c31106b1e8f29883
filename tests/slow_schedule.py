"""Any schedule, interpreted the slow way: the reference for what the runtime does beyond withdrawal.

It shares no code with the package. The stock model runs over the full sequence without a cache, with plain
attention whose every weight is computed, in the model's dtype; tokens that left are columns that nobody reads. Scores
and conditions follow their formulas sample by sample and token by token. The prompt decides; when tokens are
generated everything is computed again under the decisions of the prompt.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from tests import reference, tower
from vtwcli.models.families import FAMILIES

NAME = "slow_schedule"
GIVEN = "given"  # in a batch: the scores of a guide, [B, S]
_running: list[_Interpreter] = []


@dataclass
class Decisions:
    """What the prompt decided.

    Attributes:
        present: per layer, which tokens of the prompt may be read, [B, S].
        gone: per layer, which tokens no longer take up a position, [B, S].
        moves: per layer and sample, for slots that another row fills: which rows are summed, and over what.
        starts: per withdraw or keep action and sample, the layer at which it started, or None.
        kept: per action and sample, the kept tokens, counted among the sample's visual tokens.
        trimmed: during the answer: first layer, sample and column -> the first row that does not read it there.
    """

    present: list[torch.Tensor] = field(default_factory=list)
    gone: list[torch.Tensor] = field(default_factory=list)
    moves: list[list[dict[int, tuple[list[int], float]]]] = field(default_factory=list)
    starts: list[list[int | None]] = field(default_factory=list)
    kept: list[list[list[int] | None]] = field(default_factory=list)
    trimmed: dict[tuple[int, int, int], int] = field(default_factory=dict)


def attend(module, query, key, value, attention_mask, scaling, dropout=0.0, softcap=None, **kwargs):
    """Plain attention [B, H, Q, D]; the running interpreter changes and looks at the weights."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    _running[-1].keys = key[:, ::groups]
    scores = query @ key.transpose(2, 3) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    weights = _running[-1].after_softmax((scores + attention_mask).softmax(-1), value)
    return (weights @ value).transpose(1, 2).contiguous(), weights


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, eager_mask)


class _Interpreter:
    def __init__(
        self,
        model: Any,
        batch: dict,
        actions: list[dict],
        prompt: int,
        decided: Decisions | None,
        front: list[list[int]] | None = None,
    ):
        self.front = front
        self.layers = reference.text_layers(model)
        self.ids, self.prompt, self.decided = batch["input_ids"], prompt, decided
        self.batch, self.model_config = batch, model.config
        self.real = batch["attention_mask"].bool()
        self.visual = reference.visual_mask(model, self.ids)
        self.visual[:, prompt:] = False
        self.leaving = [a for a in actions if a["action"] in ("withdraw", "keep") and "every" not in a]
        self.trims = [a for a in actions if "every" in a]
        self.mutes = [a for a in actions if a["action"] == "mute"]
        self.freezes = [a for a in actions if a["action"] == "freeze"]
        rows = len(self.ids)
        self.present = torch.ones_like(self.visual)
        self.gone = torch.zeros_like(self.visual)
        self.stage, self.count = [0] * rows, [0] * rows
        self.new = Decisions(
            starts=[[None] * rows for _ in self.leaving], kept=[[None] * rows for _ in self.leaving]
        )
        self.layer = -1
        self.moves: list[dict[int, tuple[list[int], float]]] = [{} for _ in range(rows)]
        self.names = [{int(i): n for n, i in enumerate(self.visual[b].nonzero()[:, 0])} for b in range(rows)]
        self.merged = [0] * rows
        self.raters: list[list[int]] = []
        self.tables: tuple[torch.Tensor, ...] = ()
        self.scores: list[dict[int, dict[str, float]]] = []
        self.own: list[dict[int, dict[str, float]]] | None = None  # of the layer about to run
        self.weights = self.own_weights = self.keys = torch.empty(0)
        self.norm = model.get_submodule(FAMILIES[model.config.model_type].text_model).norm
        self.entry = self.entry_before = torch.empty(0)

    # -- before a layer

    def enter(self, index: int):
        def hook(module, args, kwargs):
            hidden = kwargs.get("hidden_states", args[0] if args else None)
            self.layer, self.entry_before, self.entry = index, self.entry, hidden
            if self.decided is None:
                here = [
                    a for a in self.leaving if a["at"] == index and a.get("select", {}).get("layer") == "here"
                ]
                if here:  # the layer runs as if nothing left, and its weights are all that is taken of it
                    self.own = []
                    module.forward(*args, **self.arguments(index, hidden, kwargs))
                if index == 0:
                    self.raters = [self.rated(b) for b in range(len(self.ids))]
                self.moves = [{} for _ in self.ids]
                for b in range(len(self.ids)):
                    self.decide(b)
                self.own = None
                self.new.moves.append(self.moves)
                self.new.present.append(self.present.clone())
                self.new.gone.append(self.gone.clone())
            else:
                for now, then in ((self.present, self.decided.present), (self.gone, self.decided.gone)):
                    now[:, : self.prompt] = then[index]
                self.moves = self.decided.moves[index]
                self.trim(index)
            self.entry = hidden = self.put(hidden)
            kwargs = self.arguments(index, hidden, kwargs)
            if args:
                return (hidden, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": hidden}

        return hook

    def arguments(self, index: int, hidden: torch.Tensor, kwargs: dict) -> dict:
        """A layer's arguments with the mask and the positions of the tokens that are there."""
        given, length = kwargs["attention_mask"], self.ids.shape[1]
        if given is None:
            allowed = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
        else:
            allowed = given if given.dtype == torch.bool else given == 0
        allowed = (allowed & (self.real & self.present)[:, None, None, :]).clone()
        allowed = allowed.expand(len(self.ids), -1, -1, -1).clone()
        for mute in self.mutes:
            if mute.get("sink", "renormalise") == "renormalise" and mute["at"] <= index < mute["until"]:
                allowed &= ~self.pairs(mute)[:, None]
        if self.decided is not None:
            for (layer, b, column), row in self.decided.trimmed.items():
                if layer <= index:
                    allowed[b, :, row:, column] = False
        for mute in self.mutes:
            if mute.get("both_ways") and mute["at"] <= index < mute["until"]:
                allowed |= self.neighbours(mute.get("steps", 1))[:, None] & self.present[:, None, None, :]
        alone = ~allowed.any(-1, keepdim=True) & torch.eye(length, dtype=torch.bool)
        allowed |= alone
        low = torch.finfo(hidden.dtype).min
        mask = torch.zeros(allowed.shape, dtype=hidden.dtype).masked_fill(~allowed, low)
        changed = {**kwargs, "attention_mask": mask}
        # one position less for each token that is gone: that of the token so many places before
        self.tables = next(kwargs[name] for name in kwargs if name.startswith("position_embeddings"))
        if self.gone.any():
            for name in [name for name in kwargs if name.startswith("position_embeddings")]:
                changed[name] = self.tables = tuple(self.moved_up(table) for table in kwargs[name])
        return changed

    def put(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states with rows moved and merged."""
        out = hidden.clone()
        for b, moves in enumerate(self.moves):
            for slot, (sources, over) in moves.items():
                out[b, slot] = sum(hidden[b, i] for i in sources) / over
        return out

    def moved_up(self, table: torch.Tensor) -> torch.Tensor:
        """Rotary embeddings [B or 1, S, D] at the positions that tokens have now."""
        rows = []
        for b in range(len(self.ids)):
            of = table[b if len(table) > 1 else 0]
            rows.append([of[i - int(self.gone[b, :i].sum())] for i in range(len(of))])
        return torch.stack([torch.stack(row) for row in rows])

    def trim(self, layer: int) -> None:
        """Let go what the newest token reads least."""
        newest = self.ids.shape[1] - 1
        step = newest + 1 - self.prompt
        for action in self.trims:
            if action["at"] != layer or step < 1 or step % action["every"]:
                continue
            for b in range(len(self.ids)):
                left = {column for at, sample, column in self.decided.trimmed if sample == b and at <= layer}
                visual = self.visual[b] & self.present[b]
                tokens = [i for i in visual.nonzero()[:, 0].tolist() if i not in left]
                self.scores = self.newest
                for i in set(tokens) - set(self.select(b, action["select"], tokens)):
                    self.decided.trimmed.setdefault((layer, b, i), newest)

    def leave(self, index: int):
        def hook(module, args, kwargs, output):
            if not any(a["at"] <= index < a["until"] for a in self.freezes):
                return output
            before = kwargs.get("hidden_states", args[0] if args else None)
            return torch.where(self.visual[:, :, None], before, output)

        return hook

    def neighbours(self, steps: int) -> torch.Tensor:
        """Pairs of visual tokens of one image that are few rows and columns apart [B, S, S]."""
        where: dict[tuple[int, int], tuple[int, int, int]] = {}
        tokens = self.visual.nonzero().tolist()
        if "image_grid_thw" in self.batch:
            merge = self.model_config.vision_config.spatial_merge_size
            sizes = [(h // merge, w // merge) for _, h, w in self.batch["image_grid_thw"].tolist()]
        else:
            images = len(self.batch["pixel_values"])
            side = math.isqrt(len(tokens) // images)
            sizes = [(side, side)] * images
        for image, (high, wide) in enumerate(sizes):
            for row in range(high):
                for column in range(wide):
                    where[tuple(tokens[len(where)])] = image, row, column
        assert len(where) == len(tokens)
        out = torch.zeros(*self.ids.shape, self.ids.shape[1], dtype=torch.bool)
        for (b, i), (image, row, column) in where.items():
            for (other, j), (image_, row_, column_) in where.items():
                if b == other and image == image_ and max(abs(row - row_), abs(column - column_)) <= steps:
                    out[b, i, j] = True
        return out

    def pairs(self, mute: dict) -> torch.Tensor:
        """Muted (row, column) pairs [B, S, S]."""
        out = torch.zeros(*self.ids.shape, self.ids.shape[1], dtype=torch.bool)
        for b in range(len(self.ids)):
            columns = self.visual[b].nonzero()[:, 0].tolist()
            if mute.get("columns", "all") == "first_half":
                columns = columns[: len(columns) // 2]
            columns = [c for c in columns if self.present[b, c]]
            for row in range(self.ids.shape[1]):
                kind = "visual" if self.visual[b, row] else "text"
                if mute.get("during", "all") == "prefill" and row >= self.prompt:
                    continue
                if mute.get("readers", "text") in (kind, "all"):
                    out[b, row, columns] = True
        return out & ~self.neighbours(mute.get("steps", 1)) if mute.get("columns") == "beyond" else out

    # -- inside attention

    def after_softmax(self, weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        original, weights = weights, weights.clone()
        active = [
            m for m in self.mutes if m["at"] <= self.layer < m["until"] and m.get("sink") in ("zero", "first")
        ]
        moved, gone = torch.zeros(2, *original.shape[:1], *original.shape[2:], dtype=torch.bool)
        for mute in active:  # where mutes overlap, the last one counts
            pairs = self.pairs(mute)
            gone |= pairs
            moved = torch.where(pairs, torch.tensor(mute["sink"] == "first"), moved)
        for b in range(len(self.ids)):
            weights[b] = original[b].masked_fill(gone[b], 0)
            for first in (self.visual[b] & self.present[b]).nonzero()[:1, 0].tolist():
                weights[b, :, :, first] += (original[b] * moved[b]).sum(-1)
        if any(a["at"] == self.layer + 1 for a in self.trims):
            newest = self.ids.shape[1] - 1
            self.newest = [self.score(weights[b], values[b], b, newest) for b in range(len(self.ids))]
        if self.own is not None:
            self.own = [self.score(weights[b], values[b], b) for b in range(len(self.ids))]
            self.own_weights = original
        elif self.decided is None:
            self.weights = original
            self.scores = [self.score(weights[b], values[b], b) for b in range(len(self.ids))]
        return weights

    @torch.no_grad()
    def score(
        self, weights: torch.Tensor, values: torch.Tensor, b: int, last: int | None = None
    ) -> dict[int, dict[str, float]]:
        """Per visual token: contribution, attention and cosine at the last row of the prompt, or at another."""
        last = int(self.real[b, : self.prompt].nonzero()[-1]) if last is None else last
        heads = range(weights.shape[0])
        c = [torch.cat([weights[h, last, i] * values[h, i] for h in heads]) for i in range(weights.shape[2])]
        o = torch.stack(c).sum(0)
        largest = weights.amax(0)
        readers = [
            r for r in range(self.prompt) if self.real[b, r] and (self.present[b, r] or not self.visual[b, r])
        ]
        seeing = [r for r in readers if self.visual[b, r]]
        asking = [r for r in readers if not self.visual[b, r]]
        return {
            int(i): {
                "contribution": float(c[i].norm()),
                "attention": float(sum(weights[h, last, i] for h in heads) / len(heads)),
                "self_cross": float(
                    sum(largest[r, i] for r in seeing)
                    / max(len(seeing), 1)
                    * sum(largest[r, i] for r in asking)
                ),
                "cosine": float(torch.nn.functional.cosine_similarity(o - c[i], o, dim=0)),
            }
            for i in self.visual[b].nonzero()[:, 0]
        }

    # -- decisions

    def decide(self, b: int) -> None:
        awaited = self.stage[b]
        for number, action in enumerate(self.leaving):
            tokens = [int(i) for i in self.visual[b].nonzero()[:, 0] if self.present[b, i]]
            if action["at"] == "auto":
                after = action.get("after")
                if number != awaited or number != self.stage[b] or not tokens:
                    continue
                if self.layer == 0 or (after is not None and self.layer - 1 <= after):
                    continue
                when, cosines = action["when"], [self.scores[b][i]["cosine"] for i in tokens]
                if "attention_below" in when:
                    holds = sum(self.scores[b][i]["attention"] for i in tokens) < when["attention_below"]
                elif "cosine_below" in when:
                    holds = min(cosines) < when["cosine_below"]
                else:
                    holds = min(cosines) >= when["cosine_above"]
                self.count[b] = (
                    self.count[b] + 1 if holds else 0 if when.get("consecutive") else self.count[b]
                )
                if self.count[b] < when.get("layers", 1):
                    continue
            elif action["at"] != self.layer or self.stage[b] > number:
                continue
            kept = self.select(b, action["select"], tokens) if action["action"] == "keep" else []
            if action["action"] == "keep":
                self.new.kept[number][b] = [self.names[b][i] for i in kept]
            if action.get("rest") and len(kept) < len(tokens):
                kept = self.recycle(b, action, tokens, kept)
            for i in tokens:
                self.present[b, i] = i in kept
            if action.get("positions") == "compact":
                self.gone[b] = self.visual[b] & ~self.present[b]
            self.stage[b], self.count[b] = number + 1, 0
            self.new.starts[number][b] = self.layer

    def select(self, b: int, select: dict, tokens: list[int]) -> list[int]:
        """The tokens to keep, in order."""
        name = select["score"]
        if "above" in select:
            scores = (
                self.changes(b, tokens)
                if name == "change"
                else {
                    i: (self.own if select.get("layer") == "here" else self.scores)[b][i][name]
                    for i in tokens
                }
            )
            return [i for i in tokens if scores[i] > select["above"]]
        if name.startswith("tower_"):
            assert self.front is not None
            return self.front[b]
        n = len(tokens)
        if "count" in select:
            wanted = min(select["count"], n)
        elif "share" in select:
            wanted = min(int(round(select["share"] * int(self.visual[b].sum()), 9)), n)
        else:
            wanted = math.ceil(select["ratio"] * n)
        if name == "uniform":
            return [tokens[math.ceil(i * n / wanted)] for i in range(wanted)]
        if name == "random":
            total = int(self.visual[b].sum())
            draw = torch.rand(total, generator=torch.Generator().manual_seed(select.get("seed", 0))).tolist()
            everything = self.visual[b].nonzero()[:, 0].tolist()
            value = {i: draw[everything.index(i)] for i in tokens}
        elif name == "guided":
            value = {i: float(self.batch[GIVEN][b, i]) for i in tokens}
        elif name == "change":
            value = self.changes(b, tokens)
        elif name != "duplication":
            scores = self.own if select.get("layer") == "here" else self.scores
            value = {i: scores[b][i][name] for i in tokens}
        if name == "duplication":
            return self.distinct(b, tokens, min(4 + 8 * (wanted // 8), n) if "share" in select else wanted)
        if {"rows", "heads", "level"} & select.keys():
            weights = (self.own_weights if select.get("layer") == "here" else self.weights)[b]
            value = self.asked(b, select, weights, tokens)
        self.value = value
        return sorted(sorted(tokens, key=lambda i: -value[i])[:wanted])

    def asked(self, b: int, select: dict, weights: torch.Tensor, tokens: list[int]) -> dict[int, float]:
        """Attention of the rows that are asked, in the heads that count."""
        rows = self.askers(b, select.get("rows", "last"), tokens)
        by_head = []
        for head in weights:
            seen = dict.fromkeys(tokens, 0.0)
            for row in rows:
                for i in tokens:
                    weight = float(head[row, i])
                    seen[i] += weight / self.distance(b, row, i) if select.get("level") else weight
            by_head.append(seen)
        by_head.sort(key=lambda seen: -sum(seen.values()))
        by_head = by_head[: select.get("heads", len(by_head))]
        return {i: sum(seen[i] for seen in by_head) for i in tokens}

    def distance(self, b: int, row: int, column: int) -> float:
        """The scaled product of two rows of ones behind rotary embedding."""
        cos, sin = (table[b if len(table) > 1 else 0].double() for table in self.tables)
        turned, width = cos.shape[1] // 2, self.keys.shape[-1]
        one, other = (
            (1 + 1j) * torch.complex(cos[i, :turned], sin[i, :turned]) for i in (row, column)
        )  # pairs of ones as complex numbers
        return (float((one * other.conj()).real.sum()) + width - 2 * turned) / width**0.5

    def rated(self, b: int) -> list[int]:
        """The rows of text that the image suits."""
        image = [int(i) for i in self.visual[b].nonzero()[:, 0]]
        text = self.askers(b, "text", image)
        if not image:
            return text
        shares = torch.zeros(len(text), dtype=self.entry.dtype)
        for i in image:
            shares += torch.stack([self.entry[b, i] @ self.entry[b, j] for j in text]).softmax(0)
        return [j for j, share in zip(text, shares, strict=True) if share > shares.mean()] or text

    def recycle(self, b: int, action: dict, tokens: list[int], kept: list[int]) -> list[int]:
        """Merge some of the tokens that are not kept; returns the slots that are filled then."""
        rest, left = action["rest"], [i for i in tokens if i not in kept]
        many = min(int(rest.get("share", 0.3) * len(left)) + 1, len(left))
        few = min(int(rest.get("into", 0.1) * many) + 1, many)
        ranked = sorted(left, key=lambda i: -self.value[i])[:many]
        x = [self.entry[b, i] for i in ranked]
        apart = [[float((p - q).norm()) / len(p) ** 0.5 for q in x] for p in x]
        noise = torch.rand(many, generator=torch.Generator().manual_seed(rest.get("seed", 0))).tolist()
        dense = [
            math.exp(-sum(d * d for d in sorted(row)[:few]) / few) + 1e-6 * n
            for row, n in zip(apart, noise, strict=True)
        ]
        lone = []
        for i, row in enumerate(apart):
            closer = [d for d, density in zip(row, dense, strict=True) if density > dense[i]]
            lone.append(min(closer) if closer else max(map(max, apart)))
        centres = sorted(range(many), key=lambda i: -dense[i] * lone[i])[:few]
        members: list[list[int]] = [[] for _ in centres]
        for i in range(many):
            nearest = min(range(few), key=lambda c: apart[i][centres[c]])
            members[centres.index(i) if i in centres else nearest].append(ranked[i])
        rows = [([i], 1.0, self.names[b][i]) for i in kept]
        rows += [(some, len(some) + 1e-6, -1 - self.merged[b] - c) for c, some in enumerate(members)]
        free, filled, names = len(tokens), [], dict(self.names[b])
        for sources, over, name in reversed(rows):  # each in its own slot, or in the last that is free
            free = min(free - 1, tokens.index(sources[0]) if name in self.names[b].values() else len(tokens))
            filled.append(tokens[free])
            names[tokens[free]], self.moves[b][tokens[free]] = name, (sources, over)
        self.names[b], self.merged[b] = names, self.merged[b] + few
        return sorted(filled)

    def changes(self, b: int, tokens: list[int]) -> dict[int, float]:
        """What the layer before changed."""
        return {i: float((self.entry[b, i] - self.entry_before[b, i]).norm()) for i in tokens}

    def distinct(self, b: int, tokens: list[int], wanted: int) -> list[int]:
        """DART's choice among ``tokens``."""
        text, states = self.askers(b, "text", tokens), self.norm(self.entry[b])
        sizes = {i: float(self.keys[b, :, i].abs().sum()) for i in tokens + text}
        visual_pivots = sorted(sorted(tokens, key=lambda i: -sizes[i])[: min(4, wanted)])
        pivots = visual_pivots + sorted(sorted(text, key=lambda i: -sizes[i])[:4])
        kept, rest = list(visual_pivots), [i for i in tokens if i not in visual_pivots]
        for number, pivot in enumerate(pivots):
            share = (wanted - len(visual_pivots)) // len(pivots)
            share += number < (wanted - len(visual_pivots)) % len(pivots)
            near = {i: float(torch.cosine_similarity(states[pivot], states[i], dim=0)) for i in rest}
            taken = sorted(rest, key=lambda i: near[i])[:share]
            kept, rest = kept + taken, [i for i in rest if i not in taken]
        return sorted(kept)

    def askers(self, b: int, rows: str, tokens: list[int]) -> list[int]:
        """Whose attention is asked; ``tokens`` are the visual ones that are there."""
        real = [i for i in range(self.prompt) if self.real[b, i]]
        everything = self.visual[b].nonzero()[:, 0].tolist()
        if rows == "last":
            return real[-1:]
        if rows == "raters":
            return self.raters[b]
        if rows == "visual":
            return tokens
        if rows == "all":
            return [i for i in real if i in tokens or i not in everything]
        return [i for i in real if i > max(everything, default=-1)] or real[-1:]


@contextmanager
def interpreted(
    model: Any,
    batch: dict,
    actions: list[dict],
    prompt: int | None = None,
    decided: Decisions | None = None,
    front: list[list[int]] | None = None,
) -> Iterator[Decisions]:
    """Inside, a call of the model with ``batch`` runs under the schedule; arguments as ``logits``."""
    prompt = batch["input_ids"].shape[1] if prompt is None else prompt
    interpreter, handles = _Interpreter(model, batch, actions, prompt, decided, front), []
    for index, layer in enumerate(interpreter.layers):
        handles.append(layer.register_forward_pre_hook(interpreter.enter(index), with_kwargs=True))
        handles.append(layer.register_forward_hook(interpreter.leave(index), with_kwargs=True))
    config = interpreter.layers[0].self_attn.config
    before = config._attn_implementation
    config._attn_implementation = NAME
    _running.append(interpreter)
    try:
        yield decided or interpreter.new
    finally:
        _running.pop()
        config._attn_implementation = before
        for handle in handles:
            handle.remove()


@torch.no_grad()
def logits(
    model: Any,
    batch: dict,
    actions: list[dict],
    prompt: int | None = None,
    decided: Decisions | None = None,
    front: list[list[int]] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, Decisions]:
    """Logits [B, S, V] of a full recompute, and what the prompt decided.

    Args:
        actions: of the schedule, in its canonical form.
        prompt: length of the prompt, padding included; everything by default.
        decided: decisions to follow instead of taking them.
        front: places of the tokens that scores of the vision tower keep, for each sample.
    """
    with interpreted(model, batch, actions, prompt, decided, front) as decisions:
        inputs = {key: value for key, value in batch.items() if key != GIVEN}
        return model(**inputs, use_cache=False, **kwargs).logits, decisions


@torch.no_grad()
def greedy(model: Any, batch: dict, actions: list[dict], steps: int, count_positions: bool = True) -> tuple:
    """Greedy tokens [B, steps], their logits [B, steps, V], and the decisions of the prompt."""
    batch, prompt, decided = dict(batch), batch["input_ids"].shape[1], None
    family = FAMILIES[model.config.model_type]
    front = next(
        (
            tower.chosen(model, batch, a["select"])
            for a in actions
            if a.get("select", {}).get("score", "").startswith("tower_")
        ),
        None,
    )
    left = torch.zeros_like(batch["attention_mask"])  # the tokens that leave in front of the language model
    if front is not None:
        left = reference.visual_mask(model, batch["input_ids"]).long()
        for b, places in enumerate(front):
            left[b, places] = 0
    tokens, scores = [], []
    for _ in range(steps):
        counted = reference.positions(batch["attention_mask"]) + int(family.model_type == "paligemma")
        gone = torch.nn.functional.pad(left, (0, batch["input_ids"].shape[1] - prompt))
        # paligemma counts from one
        extra = {"position_ids": counted - gone.cumsum(1) + gone} if count_positions else {}
        out, decided = logits(model, batch, actions, prompt, decided, front, **extra)
        token = out[:, -1].argmax(-1, keepdim=True)
        tokens.append(token)
        scores.append(out[:, -1])
        for name, fill in (("input_ids", token), ("attention_mask", torch.ones_like(token))):
            batch[name] = torch.cat([batch[name], fill], dim=1)
        for name in [name for name in batch if name.endswith("token_type_ids")]:
            kind = torch.full_like(token, family.answer_token_type if name == "token_type_ids" else 0)
            batch[name] = torch.cat([batch[name], kind], dim=1)
    return torch.cat(tokens, 1), torch.stack(scores, 1), decided
