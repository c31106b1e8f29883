"""Llama 4's layers without rotary embeddings scale queries by the number of their row, from some row on."""

from __future__ import annotations

import pytest
import torch

from tests import parity, reference
from tests.tiny import TINY
from vtwcli.errors import UsageError
from vtwcli.models.families import family_of
from vtwcli.runtime import PruningError, pruned
from vtwcli.schedule.intervention import Intervention
from vtwcli.sweep.layers import Resident
from vtwcli.sweep.sweep import SweepItem, sweep

ROWS = ["t3 i t5", "i t2 i t4"]  # the longer one has 19 tokens


def scaled(steps: int):
    """A model that scales queries anew every so many rows, and a batch."""
    model = TINY["llama4"].build()
    for layer in model.language_model.model.layers:
        layer.self_attn.attn_temperature_tuning, layer.self_attn.floor_scale = True, steps
        layer.self_attn.attn_scale = 5.0
    return model, TINY["llama4"].batch(ROWS)


@torch.no_grad()
def test_prompts_of_fewer_tokens_are_pruned_exactly_and_their_answers_scaled():
    model, batch = scaled(21)
    visual = reference.visual_mask(model, batch["input_ids"])
    expected = reference.greedy(model, batch, 2, 5)
    out, logits = parity.generated(model, batch, 2, steps=5)
    assert torch.equal(out.sequences[:, visual.shape[1] :], expected[0])
    parity.same(model, logits, expected[1])
    plain, same = TINY["llama4"].build(), 21 - visual.shape[1]
    apart = (parity.generated(plain, batch, 2, steps=5)[1] - logits).abs().amax((0, 2))
    assert not apart[:same].any() and bool((apart[same:] > 1e-3).all()), (
        "nothing was scaled, so nothing tested"
    )


@torch.no_grad()
def test_longer_prompts_are_refused_where_rows_would_be_scaled_otherwise():
    model, batch = scaled(8)
    with pruned(model, 2), pytest.raises(PruningError, match="by their row's number from 8 tokens on"):
        model(**batch)
    with pruned(model, 6):
        model(**batch)
    item = SweepItem(batch, torch.tensor([[18], [18]]))
    with pytest.raises(UsageError, match=r"a sample of 19 tokens: .* from 8 tokens on"):
        sweep(Resident(model, family_of(model.config)), [item], [Intervention("withdraw", 2)])
