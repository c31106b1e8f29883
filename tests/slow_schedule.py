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

from tests import reference
from vtwcli.models.families import FAMILIES

NAME = "slow_schedule"
_running: list[_Interpreter] = []


@dataclass
class Decisions:
    """What the prompt decided.

    Attributes:
        present: per layer, which tokens of the prompt may be read, [B, S].
        starts: per withdraw or keep action and sample, the layer at which it started, or None.
        kept: per action and sample, the kept tokens, counted among the sample's visual tokens.
        gone: during the answer: first layer, sample and column -> the first row that does not read it there.
    """

    present: list[torch.Tensor] = field(default_factory=list)
    starts: list[list[int | None]] = field(default_factory=list)
    kept: list[list[list[int] | None]] = field(default_factory=list)
    gone: dict[tuple[int, int, int], int] = field(default_factory=dict)


def attend(module, query, key, value, attention_mask, scaling, dropout=0.0, softcap=None, **kwargs):
    """Plain attention [B, H, Q, D]; the running interpreter changes and looks at the weights."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    weights = _running[-1].after_softmax((scores + attention_mask).softmax(-1), value)
    return (weights @ value).transpose(1, 2).contiguous(), weights


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, eager_mask)


class _Interpreter:
    def __init__(self, model: Any, batch: dict, actions: list[dict], prompt: int, decided: Decisions | None):
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
        self.stage, self.count = [0] * rows, [0] * rows
        self.new = Decisions(
            starts=[[None] * rows for _ in self.leaving], kept=[[None] * rows for _ in self.leaving]
        )
        self.layer = -1
        self.scores: list[dict[int, dict[str, float]]] = []

    # -- before a layer

    def enter(self, index: int):
        def hook(module, args, kwargs):
            hidden = kwargs.get("hidden_states", args[0] if args else None)
            self.layer = index
            if self.decided is None:
                for b in range(len(self.ids)):
                    self.decide(b)
                self.new.present.append(self.present.clone())
            else:
                self.present = torch.ones_like(self.visual)
                self.present[:, : self.prompt] = self.decided.present[index]
                self.trim(index)
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
                for (layer, b, column), row in self.decided.gone.items():
                    if layer <= index:
                        allowed[b, :, row:, column] = False
            for mute in self.mutes:
                if mute.get("both_ways") and mute["at"] <= index < mute["until"]:
                    allowed |= self.neighbours(mute.get("steps", 1))[:, None] & self.present[:, None, None, :]
            alone = ~allowed.any(-1, keepdim=True) & torch.eye(length, dtype=torch.bool)
            allowed |= alone
            low = torch.finfo(hidden.dtype).min
            mask = torch.zeros(allowed.shape, dtype=hidden.dtype).masked_fill(~allowed, low)
            return args, {**kwargs, "attention_mask": mask}

        return hook

    def trim(self, layer: int) -> None:
        """Let go what the newest token reads least."""
        newest = self.ids.shape[1] - 1
        step = newest + 1 - self.prompt
        for action in self.trims:
            if action["at"] != layer or step < 1 or step % action["every"]:
                continue
            for b in range(len(self.ids)):
                left = {column for at, sample, column in self.decided.gone if sample == b and at <= layer}
                visual = self.visual[b] & self.present[b]
                tokens = [i for i in visual.nonzero()[:, 0].tolist() if i not in left]
                self.scores = self.newest
                for i in set(tokens) - set(self.select(b, action["select"], tokens)):
                    self.decided.gone.setdefault((layer, b, i), newest)

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
        if self.decided is None:
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
            for i in tokens:
                self.present[b, i] = i in kept
            self.stage[b], self.count[b] = number + 1, 0
            self.new.starts[number][b] = self.layer
            if action["action"] == "keep":
                everything = self.visual[b].nonzero()[:, 0].tolist()
                self.new.kept[number][b] = [everything.index(i) for i in kept]

    def select(self, b: int, select: dict, tokens: list[int]) -> list[int]:
        """The tokens to keep, in order."""
        name = select["score"]
        if "above" in select:
            return [i for i in tokens if self.scores[b][i][name] > select["above"]]
        n = len(tokens)
        whole = int(self.visual[b].sum()) if select.get("of") == "prompt" else n
        wanted = min(select["count"], n) if "count" in select else min(math.ceil(select["ratio"] * whole), n)
        if name == "uniform":
            return [tokens[math.ceil(i * n / wanted)] for i in range(wanted)]
        if name == "random":
            total = int(self.visual[b].sum())
            draw = torch.rand(total, generator=torch.Generator().manual_seed(select.get("seed", 0))).tolist()
            everything = self.visual[b].nonzero()[:, 0].tolist()
            value = {i: draw[everything.index(i)] for i in tokens}
        else:
            value = {i: self.scores[b][i][name] for i in tokens}
        return sorted(sorted(tokens, key=lambda i: -value[i])[:wanted])


@contextmanager
def interpreted(
    model: Any, batch: dict, actions: list[dict], prompt: int | None = None, decided: Decisions | None = None
) -> Iterator[Decisions]:
    """Inside, a call of the model with ``batch`` runs under the schedule; arguments as ``logits``."""
    prompt = batch["input_ids"].shape[1] if prompt is None else prompt
    interpreter, handles = _Interpreter(model, batch, actions, prompt, decided), []
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
    **kwargs: Any,
) -> tuple[torch.Tensor, Decisions]:
    """Logits [B, S, V] of a full recompute, and what the prompt decided.

    Args:
        actions: of the schedule, in its canonical form.
        prompt: length of the prompt, padding included; everything by default.
        decided: decisions to follow instead of taking them.
    """
    with interpreted(model, batch, actions, prompt, decided) as decisions:
        return model(**batch, use_cache=False, **kwargs).logits, decisions


@torch.no_grad()
def greedy(model: Any, batch: dict, actions: list[dict], steps: int, count_positions: bool = True) -> tuple:
    """Greedy tokens [B, steps], their logits [B, steps, V], and the decisions of the prompt."""
    batch, prompt, decided = dict(batch), batch["input_ids"].shape[1], None
    family = FAMILIES[model.config.model_type]
    tokens, scores = [], []
    for _ in range(steps):
        extra = {"position_ids": reference.positions(batch["attention_mask"])} if count_positions else {}
        out, decided = logits(model, batch, actions, prompt, decided, **extra)
        token = out[:, -1].argmax(-1, keepdim=True)
        tokens.append(token)
        scores.append(out[:, -1])
        for name, fill in (("input_ids", token), ("attention_mask", torch.ones_like(token))):
            batch[name] = torch.cat([batch[name], fill], dim=1)
        for name, kind in (("token_type_ids", family.answer_token_type), ("mm_token_type_ids", 0)):
            if name in batch:
                batch[name] = torch.cat([batch[name], torch.full_like(token, kind)], dim=1)
    return torch.cat(tokens, 1), torch.stack(scores, 1), decided
