"""The slow, independent reference that pruned computations are compared with.

It shares no code with the package: the stock model runs over the full sequence, without a cache, and every
decoder layer gets an explicit additive mask. Removing a visual token from layer K on is hiding its column from
every query of layers K.. : rows that nobody reads cannot matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from vtwcli.models.families import FAMILIES, placeholder_ids


def text_layers(model: torch.nn.Module) -> torch.nn.ModuleList:
    """The decoder layers of the text model."""
    return model.get_submodule(FAMILIES[model.config.model_type].text_model).layers


def visual_mask(model: torch.nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """Which positions are visual tokens, [B, S]."""
    ids = torch.tensor(placeholder_ids(FAMILIES[model.config.model_type], model.config))
    return torch.isin(input_ids, ids)


def withdrawal(model: torch.nn.Module, visual: torch.Tensor, k: int) -> torch.Tensor:
    """Hidden columns [L, B, S] for withdrawal at layer ``k``."""
    depth = len(text_layers(model))
    return (torch.arange(depth) >= k)[:, None, None] & visual[None]


@contextmanager
def hidden_columns(
    model: torch.nn.Module, attention_mask: torch.Tensor, hidden: torch.Tensor
) -> Iterator[None]:
    """Replace each layer's mask by (its own or causal) and padding and not ``hidden`` [L, B, S] or [L, B, Q, S]."""

    def replace(index):
        def hook(module, args, kwargs):
            hidden_states = kwargs.get("hidden_states", args[0] if args else None)
            length, dtype = hidden_states.shape[1], hidden_states.dtype
            given = kwargs.get("attention_mask")
            if given is not None and given.ndim == 4:
                allowed = given if given.dtype == torch.bool else given == 0
            else:
                allowed = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
            allowed = allowed & attention_mask[:, None, None, :].bool()
            columns = hidden[index]
            allowed = allowed & ~(columns[:, None] if columns.ndim == 3 else columns[:, None, None, :])
            additive = torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)
            return args, {**kwargs, "attention_mask": additive}

        return hook

    handles = [
        layer.register_forward_pre_hook(replace(i), with_kwargs=True)
        for i, layer in enumerate(text_layers(model))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def logits(model: torch.nn.Module, batch: dict, hidden: torch.Tensor, **kwargs) -> torch.Tensor:
    """Logits [B, S, V] of a full recompute with ``hidden`` columns [L, B, S]."""
    with hidden_columns(model, batch["attention_mask"], hidden):
        return model(**batch, use_cache=False, **kwargs).logits


@torch.no_grad()
def searched(
    model: torch.nn.Module, batch: dict, interventions: Sequence[Any], rows: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(pruned ‖ full) [B, interventions, R] and agreement, by one full masked run per intervention.

    Args:
        interventions: each with its kind (withdraw, mute or freeze), start and stop, as the sweep takes them.
        rows: compared positions, [B, R].
    """
    visual, layers = visual_mask(model, batch["input_ids"]), text_layers(model)
    nothing = torch.zeros(len(layers), *visual.shape, dtype=torch.bool)
    full = logits(model, batch, nothing).double()
    kl, agree = [], []
    for one in interventions:
        handles = []
        hidden = torch.zeros(len(layers), *visual.shape, visual.shape[1], dtype=torch.bool)
        stop = len(layers) if one.stop is None else one.stop
        for d in range(one.start, stop):
            if one.kind == "withdraw":
                hidden[d] = visual[:, None, :]
            elif one.kind == "mute":
                hidden[d] = visual[:, None, :] & ~visual[:, :, None]
            else:
                handles.append(layers[d].register_forward_hook(keep_visual(visual), with_kwargs=True))
        try:
            pruned = logits(model, batch, hidden).double()
        finally:
            for handle in handles:
                handle.remove()
        log_p, log_q = (
            torch.stack([x[b, rows[b]] for b in range(len(rows))]).log_softmax(-1) for x in (pruned, full)
        )
        # kl_div(input, target) is KL(target ‖ input)
        kl.append(torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1))
        agree.append(log_p.argmax(-1) == log_q.argmax(-1))
    return torch.stack(kl, 1), torch.stack(agree, 1)


def keep_visual(visual: torch.Tensor) -> Callable:
    """A hook that puts a layer's visual rows back as they were before it."""

    def hook(module, args, kwargs, out):
        entry = args[0] if args else kwargs["hidden_states"]
        return torch.where(visual[..., None], entry, out)

    return hook


def positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """Position ids [B, S] that count attended tokens, as ``generate`` does for one-axis rotary embeddings."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


@torch.no_grad()
def greedy(model: torch.nn.Module, batch: dict, k: int, steps: int, count_positions: bool = True) -> tuple:
    """Greedy tokens [B, steps] and their logits [B, steps, V], recomputing everything for each token.

    Args:
        k: withdrawal layer; only the prompt's visual tokens are withdrawn.
        count_positions: pass ``position_ids`` counted from the mask; False lets the model find its own.
    """
    batch, family = dict(batch), FAMILIES[model.config.model_type]
    first = int(family.model_type == "paligemma")  # its generation counts positions from one
    visual = visual_mask(model, batch["input_ids"])
    tokens, scores = [], []
    last = batch["attention_mask"].shape[1] - 1
    for _ in range(steps):
        extra = {"position_ids": positions(batch["attention_mask"]) + first} if count_positions else {}
        out = logits(model, batch, withdrawal(model, visual, k), **extra)[:, last]
        token = out.argmax(-1, keepdim=True)
        tokens.append(token)
        scores.append(out)
        for name, fill in (("input_ids", token), ("attention_mask", torch.ones_like(token))):
            batch[name] = torch.cat([batch[name], fill], dim=1)
        for name in [name for name in batch if name.endswith("token_type_ids")]:
            kind = torch.full_like(token, family.answer_token_type if name == "token_type_ids" else 0)
            batch[name] = torch.cat([batch[name], kind], dim=1)
        visual = torch.cat([visual, torch.zeros_like(token, dtype=torch.bool)], dim=1)
        last += 1
    return torch.cat(tokens, dim=1), torch.stack(scores, dim=1)
