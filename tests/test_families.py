"""Every row of the family table, proved on its tiny model; a new row and its tiny model need no test code here."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from transformers import LlavaConfig, MistralConfig

from tests import reference
from tests.tiny import LAYERS, TINY, VARIANTS
from vtwcli.errors import NotFoundError
from vtwcli.models.families import FAMILIES, family_of, markdown, placeholder_ids, table
from vtwcli.models.layers import Resident
from vtwcli.sweep import Intervention, SweepItem, naive, sweep

MODELS = TINY | VARIANTS
REFUSED = [name for name, row in FAMILIES.items() if row.no_withdraw]
WORKING = [name for name in MODELS if name not in REFUSED]
VIDEOS = [name for name in WORKING if MODELS[name].video]
SWEPT = [name for name in WORKING if name in VARIANTS or not FAMILIES[name].no_sweep]

IMAGES = ["t3 i t5", "i t2 i t4", "t6"]
FRAMES = ["t2 v t3 v t2", "v t4"]
LAYOUTS = [(name, IMAGES) for name in WORKING] + [(name, FRAMES) for name in VIDEOS]
SWEEPS = [(name, rows) for name, rows in LAYOUTS if name in SWEPT]


@cache
def model_of(name: str, dtype: torch.dtype = torch.float64):
    """The tiny model of a name in ``MODELS``, built once."""
    return MODELS[name].build(dtype=dtype)


def inputs_of(name: str, rows: list[str], side: str = "left", dtype: torch.dtype = torch.float64) -> dict:
    return MODELS[name].batch(rows, side=side, dtype=dtype)


@torch.no_grad()
def stock(model, batch: dict, **kwargs) -> torch.Tensor:
    return model(**batch, use_cache=False, **kwargs).logits


def test_each_row_has_a_tiny_model_and_each_tiny_model_a_row():
    assert set(TINY) == set(FAMILIES)
    for name, row in FAMILIES.items():
        assert TINY[name].video == row.video, name


@pytest.mark.parametrize("name", WORKING)
def test_a_row_tells_where_things_are(name):
    model = model_of(name)
    row = family_of(model.config)
    assert type(model).__name__ == row.architecture
    text_model = model.get_submodule(row.text_model)
    assert len(text_model.layers) == LAYERS
    for part in ("embed_tokens", "norm", "rotary_emb"):
        assert isinstance(getattr(text_model, part), torch.nn.Module)
    assert model.get_submodule(row.head) is model.get_output_embeddings()
    homes = (row.text_model, row.head, *row.vision)
    names = [n for n, _ in model.named_parameters(remove_duplicate=False)]
    assert [n for n in names if not n.startswith(tuple(f"{home}." for home in homes)) and n not in homes] == []
    for home in homes:
        owner, _, attribute = home.rpartition(".")
        assert hasattr(model.get_submodule(owner), attribute), home


def close(model, actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to 1e-9; to 1e-4 where attention is eager, whose softmax is computed in float32."""
    eager = model.config.get_text_config()._attn_implementation == "eager"
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4 if eager else 1e-9)


@torch.no_grad()
def by_hand(model, batch: dict, visual: torch.Tensor) -> list[torch.Tensor]:
    """Last-row logits for K = 0..L-1 of one unpadded row: the rows of visual tokens are cut out of what the stock
    model hands layer K and all later layers, which then run by themselves."""
    row = family_of(model.config)
    text_model = model.get_submodule(row.text_model)
    entries, handed = [], []

    def record(module, args, kwargs):
        entries.append(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])
        handed.append({k: v for k, v in kwargs.items() if k not in ("hidden_states", "past_key_values")})

    handles = [layer.register_forward_pre_hook(record, with_kwargs=True) for layer in text_model.layers]
    stock(model, batch)
    for handle in handles:
        handle.remove()
    keep = (~visual[0]).nonzero()[:, 0]
    results = []
    for k in range(len(entries)):
        hidden = entries[k][:, keep]
        for layer, kwargs in list(zip(text_model.layers, handed, strict=True))[k:]:
            given, mask = dict(kwargs), kwargs["attention_mask"]
            given["position_embeddings"] = tuple(x[:, keep] for x in kwargs["position_embeddings"])
            given["position_ids"] = None
            given["attention_mask"] = None if mask is None else mask[:, :, keep][:, :, :, keep]
            hidden = layer(hidden, **given)
        logits = model.get_submodule(row.head)(text_model.norm(hidden[:, -1]))
        cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        results.append(torch.tanh(logits / cap) * cap if cap else logits)
    return results


@pytest.mark.parametrize("name", WORKING)
def test_the_reference_is_the_stock_model_at_the_end_and_removal_by_hand_before(name):
    model = model_of(name)
    for side in ("left", "right"):
        batch = inputs_of(name, IMAGES, side)
        visual = reference.visual_mask(model, batch["input_ids"])
        real = batch["attention_mask"].bool()
        same = reference.logits(model, batch, reference.withdrawal(model, visual, LAYERS))
        close(model, same[real], stock(model, batch)[real])
    batch = inputs_of(name, ["t3 i t2 i t5"])
    visual = reference.visual_mask(model, batch["input_ids"])
    full = stock(model, batch)[:, -1]
    for k, expected in enumerate(by_hand(model, batch, visual)):
        actual = reference.logits(model, batch, reference.withdrawal(model, visual, k))[:, -1]
        close(model, actual, expected)
        assert (expected - full).abs().max() > 1e-3, "withdrawal changes nothing, so nothing was tested"


def divergence(pruned: torch.Tensor, full: torch.Tensor) -> torch.Tensor:
    """KL(P_pruned || P_full) over the last axis of logits, nats."""
    pruned, full = pruned.double().log_softmax(-1), full.double().log_softmax(-1)
    return (pruned.exp() * (pruned - full)).sum(-1)


@pytest.mark.parametrize(("name", "rows"), SWEEPS)
def test_the_sweep_is_the_slow_search(name, rows):
    model = model_of(name)
    batch = inputs_of(name, rows)
    visual = reference.visual_mask(model, batch["input_ids"])
    width = visual.shape[1]
    compared = torch.tensor([[width - 2, width - 1]]).expand(len(rows), -1)
    source = Resident(model, family_of(model.config))
    withdrawals = [Intervention("withdraw", k) for k in range(LAYERS)]
    others = [Intervention("mute", 1, 3), Intervention("mute", 2), Intervention("freeze", 1, 4)]
    item = SweepItem(batch, compared)
    swept = sweep(source, [item], [*withdrawals, *others])
    searched = naive(source, [item], others)

    full = stock(model, batch)[:, -2:]
    expected = torch.stack(
        [
            divergence(reference.logits(model, batch, reference.withdrawal(model, visual, k))[:, -2:], full)
            for k in range(LAYERS)
        ]
    )
    for b, result in enumerate(swept):
        close(model, result.kl[:LAYERS], expected[:, b])
        close(model, result.kl[LAYERS:], searched[b].kl)
        assert result.visual == int(visual[b].sum())
        if result.visual:
            assert (result.kl > 1e-4).all(), "an intervention that changes nothing tests nothing"
