"""Frozen rows: what they give is what computing them and putting them back gives, and they cost keys and values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from tests import parity, reference, slow_schedule
from tests.test_runtime import batch_of, gradients, joined, labelled, positions
from tests.test_runtime_schedules import LAYOUTS, WORKING, any_actions, check_forward, model_of, schedule
from tests.tiny import LAYERS, TINY, VARIANTS, llava
from vtwcli.runtime import pruned

FREEZE = [{"at": 1, "until": 4, "action": "freeze"}]
AMONG_OTHERS = [
    {"at": 1, "until": 3, "action": "freeze"},
    {"at": 2, "until": 4, "action": "mute", "sink": "first"},
    {"at": 4, "action": "keep", "select": {"score": "uniform", "ratio": 0.5}},
    {"at": 4, "until": 6, "action": "freeze"},
    {"at": 5, "until": 6, "action": "mute"},
]


@contextmanager
def put_back(model: torch.nn.Module, batch: dict, layers: range) -> Iterator[None]:
    """Compute every row of every layer, and put the visual ones of ``layers`` back."""
    visual = reference.visual_mask(model, batch["input_ids"])[:, :, None]

    def leave(module, args, kwargs, output):
        before = kwargs.get("hidden_states", args[0] if args else None)
        if before.shape[1] != visual.shape[1]:
            return output  # a decode step
        if isinstance(output, tuple):
            return (torch.where(visual, before, output[0]), *output[1:])
        return torch.where(visual, before, output)

    stock = reference.text_layers(model)
    handles = [stock[d].register_forward_hook(leave, with_kwargs=True, prepend=True) for d in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("name", WORKING)
def test_what_is_put_back_need_not_be_computed(name, attn):
    """Prefill with a cache and without, on either side padded, and the steps behind it."""
    tiny = (TINY | VARIANTS)[name]
    model = tiny.build(dtype=torch.float64, attn=attn)
    layers = range(1, 4)
    for side in ("left", "right"):
        batch = tiny.batch(LAYOUTS[1][:2], side=side, dtype=torch.float64)
        real = batch["attention_mask"].bool()
        for use_cache in (True, False):
            with put_back(model, batch, layers):
                expected = model(**batch, use_cache=use_cache, output_hidden_states=True)
            with pruned(model, schedule(FREEZE)):
                actual = model(**batch, use_cache=use_cache, output_hidden_states=True)
            near(actual.logits[real], expected.logits[real])
            for one, two in zip(actual.hidden_states, expected.hidden_states, strict=True):
                near(one[real], two[real])
    batch = tiny.batch(LAYOUTS[1][:2], dtype=torch.float64)
    options = {
        "max_new_tokens": 3,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    with put_back(model, batch, layers):
        expected = model.generate(**batch, **options)
    with pruned(model, schedule(FREEZE)):
        actual = model.generate(**batch, **options)
    for one, two in zip(actual.logits, expected.logits, strict=True):
        near(one, two)


def near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", WORKING)
def test_every_family_freezes_among_other_actions(name):
    tiny = (TINY | VARIANTS)[name]
    model = tiny.build(dtype=torch.float64)
    for rows in (["t3 i t5", "t2 i t3 i t2"], ["t2 i", "t4"]):
        batch = tiny.batch(rows, dtype=torch.float64)
        check_forward(model, batch, AMONG_OTHERS, atol=1e-12 if "gemma" not in name else 1e-9)


@st.composite
def with_freezes(draw) -> list[dict]:
    """``any_actions`` with one or two freezes anywhere among them."""
    actions = draw(any_actions())
    for _ in range(draw(st.integers(1, 2))):
        at = draw(st.integers(0, LAYERS - 1))
        freeze = {"at": at, "until": draw(st.integers(at + 1, LAYERS)), "action": "freeze"}
        place = sum(a.get("after", a["at"]) <= at for a in actions)
        if any(a["action"] == "withdraw" for a in actions[:place]):
            place -= 1
            freeze["at"] = actions[place].get("after", actions[place]["at"])
            freeze["until"] = freeze["at"] + 1
        actions.insert(place, freeze)
    return actions


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    actions=with_freezes(),
    rows=st.lists(
        st.sampled_from(["t3 i t5", "i t2", "t6", "t2 i t1 i t2", "t1 i i t3", "t2 i", "i"]),
        min_size=1,
        max_size=3,
    ),
    side=st.sampled_from(["left", "right"]),
)
def test_any_schedule_with_freezes_on_any_layout(actions, rows, side):
    check_forward(model_of(), batch_of(rows, side), actions, atol=1e-12)


def test_generation_among_other_actions():
    for rows in LAYOUTS:
        batch = batch_of(rows)
        tokens, scores, _ = slow_schedule.greedy(model_of(), batch, AMONG_OTHERS, 4)
        out, logits = parity.generated(model_of(), batch, schedule(AMONG_OTHERS))
        assert torch.equal(out.sequences[:, -4:], tokens)
        near(logits, scores)


@torch.no_grad()
def test_a_second_image_on_the_same_cache():
    """Its text reads the first turn's entries, which lie in another order than its tokens."""
    model = model_of()
    first, second = batch_of(["t3 i t5"]), batch_of(["t2 i t4"], seed=1)
    whole, width = joined(first, second), second["input_ids"].shape[1]
    with put_back(model, whole, range(1, 4)):
        expected = model(**whole, use_cache=False, **positions(whole, 0)).logits
    cache = DynamicCache(config=model.config.text_config)
    with pruned(model, schedule(FREEZE)):
        model(**first, past_key_values=cache, **positions(first, 0))
        rest = second | {"attention_mask": whole["attention_mask"]}
        actual = model(**rest, past_key_values=cache, **positions(whole, width)).logits
    near(actual, expected[:, -width:])


def test_gradients():
    model, batch = llava(dtype=torch.float64).train(), labelled(batch_of(["t3 i t5", "t2 i t3 i t4"]))
    with put_back(model, batch, range(1, 4)):
        loss, expected = gradients(model, batch)
    with pruned(model, schedule(FREEZE)):
        frozen_loss, actual = gradients(model, batch)
    assert frozen_loss == pytest.approx(loss, abs=1e-12)
    assert actual.keys() == expected.keys()
    for name, gradient in actual.items():
        near(gradient, expected[name])


# ------------------------------------------------------------------------------------------------ what it saves


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [True, False])
def test_frozen_rows_have_keys_and_values_only(use_cache):
    model, batch = model_of(), batch_of(["t3 i t5", "t2 i t3 i t2"])
    rows: dict[str, dict[int, int]] = {}

    def count(name, layer):
        def hook(module, args):
            there = rows.setdefault(name, dict.fromkeys(range(LAYERS), 0))
            there[layer] += args[0].shape[1]

        return hook

    handles = []
    for d, layer in enumerate(reference.text_layers(model)):
        parts = {f"self_attn.{part}_proj": layer.self_attn.get_submodule(f"{part}_proj") for part in "qkvo"}
        for name, module in {**parts, "mlp": layer.mlp}.items():
            handles.append(module.register_forward_pre_hook(count(name, d)))
    try:
        with pruned(model, schedule(FREEZE)) as running:
            model(**batch, use_cache=use_cache)
    finally:
        for handle in handles:
            handle.remove()
    width, text, visual = 25, 8, 18  # the most of either kind in any row of the batch
    frozen = range(1, 4)
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp"):
        assert rows[name] == {d: text if d in frozen else width for d in range(LAYERS)}
    for name in ("self_attn.k_proj", "self_attn.v_proj"):
        assert rows[name] == {d: text + visual if d in frozen else width for d in range(LAYERS)}
    for sample in running.trace.samples:
        assert [layer.rows for layer in sample.layers] == [width, text, text, text, width, width]
        assert sample.visual_per_layer == [sample.visual] * LAYERS


@torch.no_grad()
def test_nothing_is_saved_where_nothing_is_visual():
    """Behind the withdrawal, and in a batch without images, frozen layers are like others."""
    model, actions = model_of(), [*FREEZE, {"at": 3, "action": "withdraw"}]
    actions[0] = actions[0] | {"until": 5}
    check_forward(model, batch_of(LAYOUTS[1]), actions, atol=1e-12)
    check_forward(model, batch_of(LAYOUTS[2]), actions, atol=1e-12)
    text = batch_of(["t5", "t3"])
    with pruned(model, schedule(FREEZE)):
        assert torch.equal(model(**text).logits, model_of()(**text).logits)
