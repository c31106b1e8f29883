"""Checks of the runtime against the slow reference that hold for every family.

Each takes a model and ``make_batch``: ``(rows, side=..., dtype=...)`` -> inputs, as in ``tests.tiny``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from tests import reference
from vtwcli.models.families import family_of
from vtwcli.runtime import pruned

STEPS = 4


def tolerance(model: Any) -> float:
    """How far the logits of two computations of one thing may differ on any CPU: they are below 20, and rounding in
    the last bit grows a hundredfold through the layers."""
    return 1e-9 if model.dtype == torch.float64 else 1e-4


def same(model: Any, actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance(model))


def last_of(real: torch.Tensor) -> torch.Tensor:
    """Which token is the last of its row, [B, S]; it predicts the next one, whatever it is."""
    return real & (real.flip(1).cumsum(1).flip(1) == 1)


def layers_of(model: Any) -> range:
    """Every K at which the family's visual tokens may leave, L included."""
    return range(family_of(model.config).first_withdrawal, len(reference.text_layers(model)) + 1)


def forward(
    model: Any,
    make_batch: Callable[..., dict],
    rows: Sequence[str],
    side: str = "left",
    layers: Sequence[int] | None = None,
    use_cache: bool = False,
) -> None:
    """One forward pass for each K: the logits of every text token, and of a sample's last token whatever it is."""
    batch = make_batch(list(rows), side=side, dtype=model.dtype)
    visual = reference.visual_mask(model, batch["input_ids"])
    real = batch["attention_mask"].bool()
    read = real & (~visual | last_of(real))
    for k in layers_of(model) if layers is None else layers:
        expected = reference.logits(model, batch, reference.withdrawal(model, visual, k))
        with torch.no_grad(), pruned(model, k):
            actual = model(**batch, use_cache=use_cache).logits
        assert actual.shape == expected.shape
        same(model, actual[read], expected[read])


@torch.no_grad()
def generated(
    model: Any,
    batch: dict,
    schedule: Any,
    steps: int = STEPS,
    given: torch.Tensor | None = None,
    **options: Any,
) -> tuple:
    """What ``generate`` gives under a schedule (None: no schedule): its output and the logits [B, steps, V].

    With a guide's scores ``given``.

    The logits are those the model returns; the ones ``generate`` reports are rounded to float32.
    """
    seen: list[torch.Tensor] = []
    handle = model.register_forward_hook(lambda _, args, out: seen.append(out.logits[:, -1]))
    options = {"max_new_tokens": steps, "do_sample": False, "return_dict_in_generate": True} | options
    try:
        with nullcontext() if schedule is None else pruned(model, schedule) as running:
            if given is not None:
                running.given = given
            out = model.generate(**batch, **options)
    finally:
        handle.remove()
    return out, torch.stack(seen, 1)


def generation(
    model: Any,
    make_batch: Callable[..., dict],
    rows: Sequence[str],
    layers: Sequence[int] | None = None,
    own_positions: bool = False,
) -> None:
    """Greedy generation for each K: tokens identical, logits equal, and caches shorter from K on.

    Args:
        own_positions: whether the model finds position ids of several axes by itself.
    """
    batch = make_batch(list(rows), dtype=model.dtype)
    visual = reference.visual_mask(model, batch["input_ids"])
    width, depth = visual.shape[1], len(reference.text_layers(model))
    real = batch["attention_mask"].bool()
    fewest = int((real & (~visual | last_of(real))).sum(1).max())
    wanted = {
        k: reference.greedy(model, batch, k, STEPS, count_positions=not own_positions)
        for k in {depth, *(layers_of(model) if layers is None else layers)}
    }
    same(model, generated(model, batch, None)[1], wanted[depth][1])
    for k, (tokens, scores) in wanted.items():
        out, logits = generated(model, batch, k)
        assert torch.equal(out.sequences[:, width:], tokens), f"K = {k}"
        same(model, logits, scores)
        for index, layer in enumerate(out.past_key_values.layers):
            if index >= k and visual.any() and layer.keys is not None:  # some layers borrow those of others
                assert layer.keys.shape[2] <= fewest + STEPS - 1, f"layer {index} holds visual tokens"
