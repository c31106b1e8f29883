"""A Llama by hand, for published rules written out: full attention, no cache, one sample, no code of the package.

A rule is called before each layer with the state of the rows that enter it and may take some away, put others in
their place or number them anew. Every generated token recomputes everything; rules look at the prompt alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class State:
    """The rows that enter a layer.

    Attributes:
        x: hidden states [n, D].
        who: index of each row in the whole sequence; rows made out of others have negative numbers.
        pos: their positions, [n].
        prompt: length of the prompt.
        visual: indices of its visual tokens.
        before: hidden states that entered the layer before, of the same rows; None at layer 0.
        weights: attention weights of the layer before, [H, n, n].
        keys: its keys behind rotary embedding, [H_kv, n, E].
        notes: what the rule wants to remember within one pass.
    """

    x: Tensor
    who: list[int]
    pos: Tensor
    prompt: int
    visual: range
    before: Tensor | None = None
    weights: Tensor | None = None
    keys: Tensor | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def image(self) -> list[int]:
        """Where visual rows are."""
        return [j for j, w in enumerate(self.who) if w in self.visual or w < 0]

    @property
    def question(self) -> list[int]:
        """Where the rows of the prompt behind the image are."""
        return [j for j, w in enumerate(self.who) if self.visual.stop <= w < self.prompt]

    @property
    def last(self) -> int:
        """Where the prompt's last row is."""
        return self.who.index(self.prompt - 1)

    def keep(self, rows: list[int]) -> list[int]:
        """Take away all visual rows but these; returns who they are."""
        stay = [j for j in range(len(self.who)) if j in set(rows) or j not in set(self.image)]
        kept = [self.who[j] for j in sorted(rows)]
        self.x, self.pos, self.who = self.x[stay], self.pos[stay], [self.who[j] for j in stay]
        return kept

    def renumber(self) -> None:
        """Number all rows anew."""
        self.pos = torch.arange(len(self.who))


Rule = Callable[["Plain", int, State], None]


class Plain:
    """The text model of a ``LlavaForConditionalGeneration``, written out, in float64."""

    def __init__(self, model: Any) -> None:
        config, text = model.config.text_config, model.model.language_model
        self.head, self.text = copy.deepcopy(model.lm_head).double(), copy.deepcopy(text).double()
        self.heads, self.kv = config.num_attention_heads, config.num_key_value_heads
        self.width, self.eps = config.hidden_size // self.heads, config.rms_norm_eps
        self.theta = config.rope_parameters["rope_theta"]

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + self.eps).rsqrt() * weight

    def turned(self, x: Tensor, pos: Tensor) -> Tensor:
        """Rows x [H, n, E] at positions [n]; angles are float32 everywhere."""
        turns = pos[:, None].float() * (
            1 / self.theta ** (torch.arange(0, self.width, 2).float() / self.width)
        )
        turns = torch.cat([turns, turns], -1)
        cos, sin = turns.cos().to(x.dtype), turns.sin().to(x.dtype)
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    def queries_keys(self, index: int, x: Tensor, pos: Tensor) -> tuple[Tensor, Tensor]:
        """Queries [H, n, E] and keys [H_kv, n, E] of layer ``index`` for rows that enter it."""
        layer = self.text.layers[index]
        h = self.norm(x, layer.input_layernorm.weight)
        q = layer.self_attn.q_proj(h).view(len(x), self.heads, self.width).transpose(0, 1)
        k = layer.self_attn.k_proj(h).view(len(x), self.kv, self.width).transpose(0, 1)
        return self.turned(q, pos), self.turned(k, pos)

    def weights(self, index: int, x: Tensor, pos: Tensor) -> Tensor:
        """Attention weights [H, n, n]."""
        q, k = self.queries_keys(index, x, pos)
        k = k.repeat_interleave(self.heads // self.kv, 0)
        hidden = ~torch.ones(len(x), len(x), dtype=torch.bool).tril()
        return (q @ k.transpose(1, 2) * self.width**-0.5).masked_fill(hidden, -torch.inf).softmax(-1)

    def layer(self, index: int, x: Tensor, pos: Tensor) -> tuple[Tensor, Tensor]:
        """What leaves a layer, and its weights."""
        layer, weights = self.text.layers[index], self.weights(index, x, pos)
        v = layer.self_attn.v_proj(self.norm(x, layer.input_layernorm.weight))
        v = v.view(len(x), self.kv, self.width).transpose(0, 1).repeat_interleave(self.heads // self.kv, 0)
        x = x + layer.self_attn.o_proj((weights @ v).transpose(0, 1).reshape(len(x), -1))
        return x + layer.mlp(self.norm(x, layer.post_attention_layernorm.weight)), weights

    @torch.no_grad()
    def answer(
        self, ids: Tensor, features: Tensor, visual: range, rule: Rule, steps: int, anew: bool = False
    ):
        """Greedy tokens, their logits [steps, V], and how many rows entered each layer of the prompt.

        Args:
            anew: whether every token's pass is a prompt of its own.
        """
        x0 = self.text.embed_tokens(ids)
        x0[visual.start : visual.stop] = features.double()
        tokens, logits, lengths = [], [], []
        for step in range(steps):
            prompt = len(x0) if anew else len(ids)
            state = State(x0, list(range(len(x0))), torch.arange(len(x0)), prompt, visual)
            for index in range(len(self.text.layers)):
                rule(self, index, state)
                if not step:
                    lengths.append(len(state.who))
                state.before = state.x
                state.keys = self.queries_keys(index, state.x, state.pos)[1]
                state.x, state.weights = self.layer(index, state.x, state.pos)
            last = self.head(self.norm(state.x[-1], self.text.norm.weight))
            logits.append(last)
            tokens.append(int(last.argmax()))
            x0 = torch.cat([x0, self.text.embed_tokens(last.argmax())[None]])
        return tokens, torch.stack(logits), lengths


def best(scores: Tensor, rows: list[int], n: int) -> list[int]:
    """Those of ``rows`` with the n largest scores, in order."""
    return sorted(sorted(rows, key=lambda j: -float(scores[j]))[:n])
