"""A LLaMA decoder in plain torch, of which published rules are written out by hand; it shares no code with the package.

Everything is computed over the full sequence, every attention weight is there to be looked at, and rows that left are
columns that nobody reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests import golden

Look = Callable[[int, Tensor, Tensor], Tensor]


@dataclass
class Rule:
    """What is done in the layers.

    Attributes:
        frozen: layers in which visual rows leave as they entered.
        allowed: who may read whom in a layer, given what causality allows: (layer, bool [S, S]) -> bool [S, S].
        leave: behind the attention of a layer, which rows are still read in the next: (layer, weights [H, S, S],
            present [S]) -> [S].
    """

    frozen: set[int] = field(default_factory=set)
    allowed: Callable[[int, Tensor], Tensor] = lambda layer, causal: causal
    leave: Look = lambda layer, weights, present: present


class Plain:
    """The decoder ``gqa``, in the type wanted."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        import json

        self.config = json.loads((golden.HERE / "gqa.config.json").read_text())
        weights = load_file(golden.HERE / "gqa.safetensors")
        self.weights = {name: one.to(dtype) for name, one in weights.items()}
        self.dtype, self.depth = dtype, self.config["num_hidden_layers"]

    def sample(self, number: int, tokens: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
        """Embeddings [S, D] of a golden sample with answer tokens behind it, and which rows are visual [S]."""
        arrays = load_file(golden.HERE / "gqa.inputs.safetensors")
        embeds = arrays[f"inputs_embeds.{number}"][0].to(self.dtype)
        more = self.weights["model.embed_tokens.weight"][torch.tensor(list(tokens), dtype=torch.long)]
        visual = torch.zeros(len(embeds) + len(more), dtype=torch.bool)
        visual[golden.BEFORE : golden.BEFORE + golden.VISUAL] = True
        return torch.cat([embeds, more]), visual

    def __call__(self, hidden: Tensor, visual: Tensor, rule: Rule) -> tuple[Tensor, list[Tensor]]:
        """Logits [S, V], and which rows were there in each layer."""
        length, present, seen = len(hidden), torch.ones(len(hidden), dtype=torch.bool), []
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        for layer in range(self.depth):
            seen.append(present)
            before, w = hidden, f"model.layers.{layer}"
            x = self._norm(hidden, f"{w}.input_layernorm")
            query, key, value = (self._heads(x, f"{w}.self_attn.{name}_proj") for name in "qkv")
            query, key = self._rotated(query), self._rotated(key)
            groups = len(query) // len(key)
            key, value = key.repeat_interleave(groups, 0), value.repeat_interleave(groups, 0)
            scores = query @ key.transpose(1, 2) / math.sqrt(query.shape[2])
            allowed = rule.allowed(layer, causal) & present
            allowed = allowed | torch.eye(length, dtype=torch.bool)  # rows that left may read themselves
            weights = scores.masked_fill(~allowed, -math.inf).softmax(-1)
            out = (weights @ value).transpose(0, 1).reshape(length, -1)
            hidden = hidden + self._linear(out, f"{w}.self_attn.o_proj")
            x = self._norm(hidden, f"{w}.post_attention_layernorm")
            gate = torch.nn.functional.silu(self._linear(x, f"{w}.mlp.gate_proj"))
            hidden = hidden + self._linear(gate * self._linear(x, f"{w}.mlp.up_proj"), f"{w}.mlp.down_proj")
            if layer in rule.frozen:
                hidden = torch.where(visual[:, None], before, hidden)
            present = rule.leave(layer, weights, present)
        return self._linear(self._norm(hidden, "model.norm"), "lm_head"), seen

    def greedy(self, number: int, steps: int, rule: Rule) -> tuple[list[int], Tensor]:
        """Tokens and their logits [steps, V]; everything is computed again for each."""
        tokens: list[int] = []
        rows = []
        for _ in range(steps):
            rows.append(self(*self.sample(number, tokens), rule)[0][-1])
            tokens.append(int(rows[-1].argmax()))
        return tokens, torch.stack(rows)

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.weights[f"{name}.weight"].T

    def _norm(self, x: Tensor, name: str) -> Tensor:
        scale = (x.square().mean(-1, keepdim=True) + self.config["rms_norm_eps"]).rsqrt()
        return x * scale * self.weights[f"{name}.weight"]

    def _heads(self, x: Tensor, name: str) -> Tensor:
        size = self.config["hidden_size"] // self.config["num_attention_heads"]
        return self._linear(x, name).view(len(x), -1, size).transpose(0, 1)

    def _rotated(self, x: Tensor) -> Tensor:
        half = x.shape[2] // 2
        speed = 1 / self.config["rope_theta"] ** (torch.arange(0, 2 * half, 2).float() / (2 * half))
        angle = torch.arange(x.shape[1]).float()[:, None] * speed  # in single, as the library has it
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        one, two = x[..., :half], x[..., half:]
        return torch.cat([one * cos - two * sin, two * cos + one * sin], -1)


def probability(logits: Tensor) -> Any:
    """Probabilities and their logarithms, in double."""
    log = logits.double().log_softmax(-1)
    return log.exp(), log
