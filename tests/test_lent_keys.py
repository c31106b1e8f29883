"""Gemma 4's last layers borrow keys and values of earlier ones; here layers 3 and 5 those of 1, layer 4 those of 2."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from tests import parity, reference
from tests.test_trie import item_of, led
from tests.tiny import LAYERS, TINY
from vtwcli.models.families import family_of
from vtwcli.runtime import PruningError, pruned
from vtwcli.runtime.lent import lenders
from vtwcli.schedule.schedule import Schedule
from vtwcli.sweep.layers import Resident
from vtwcli.sweep.schedules import follow, plan_of

ROWS = ["t3 i t5", "t2 i t1 i t4"]
UNIFORM = {"score": "uniform", "count": 2}
KEEP = {"score": "attention", "ratio": 0.5}


@cache
def tiny_model(attn: str = "sdpa"):
    return TINY["gemma4"].build(dtype=torch.float64, attn=attn)


def batch_of(rows: list[str] = ROWS) -> dict:
    return TINY["gemma4"].batch(rows, dtype=torch.float64)


def schedule(*actions: dict) -> dict:
    return {"format_version": 1, "actions": list(actions)}


def test_the_layers_are_who_they_are_said_to_be():
    assert lenders(reference.text_layers(tiny_model())) == {3: 1, 4: 2, 5: 1}


@pytest.mark.parametrize("k", [0, 2, 4])
def test_both_attentions_beams_and_answers_are_the_reference(k):
    """Beams reorder the cache of the lenders, and what it knows of who reads which entry."""
    batch = batch_of()
    tokens, scores = reference.greedy(tiny_model(), batch, k, 4)
    for attn in ("sdpa", "eager"):
        out, logits = parity.generated(tiny_model(attn), batch, k)
        assert torch.equal(out.sequences[:, -4:], tokens)
        parity.same(tiny_model(), logits, scores)
    one = {name: x[:1] if name != "pixel_values" else x for name, x in batch_of(ROWS[:1]).items()}
    with pruned(tiny_model(), k):
        beams = [
            tiny_model().generate(**one, max_new_tokens=4, do_sample=False, num_beams=3, use_cache=cached)
            for cached in (True, False)
        ]
    assert torch.equal(*beams)


@torch.no_grad()
@pytest.mark.parametrize(
    "actions",
    [
        [{"at": 1, "until": 3, "action": "mute"}],
        [{"at": 1, "until": 3, "action": "mute", "sink": "zero"}],
        [{"at": 4, "until": 6, "action": "mute", "sink": "first"}],
        [{"at": 1, "until": 6, "action": "freeze"}],
        [{"at": 4, "action": "keep", "select": KEEP}, {"at": 5, "action": "withdraw"}],
        [
            {"at": 2, "action": "keep", "select": KEEP},
            {"at": 3, "until": 5, "action": "mute", "sink": "zero"},
        ],
        [{"at": "auto", "after": 2, "action": "withdraw", "when": {"cosine_below": 0.9999}}],
    ],
    ids=str,
)
def test_schedules_in_the_runtime_are_those_of_the_sweep(actions):
    """Led along one answer; the two have no code for this in common."""
    model, batch = tiny_model(), batch_of(ROWS[1:])
    answer = torch.tensor([[11, 40, 23]])
    full = led(model, batch, answer).log_softmax(-1)
    plan = schedule(*actions)
    with pruned(model, plan):
        mine = led(model, batch, answer).log_softmax(-1)
    family = family_of(model.config)
    plans = [plan_of(Schedule.from_dict(plan), LAYERS, family)]
    [found] = follow(Resident(model, family), [item_of(batch, answer)], plans)
    kl = (mine.exp() * (mine - full)).sum(-1)
    parity.same(model, found.kl[0], kl)
    assert kl.min() > 1e-6, "nothing was done, so nothing tested"


@torch.no_grad()
def test_a_second_turn_and_a_cropped_cache_know_who_reads_which_entry():
    from transformers import DynamicCache

    model, batch = tiny_model(), batch_of(ROWS[:1])
    held = DynamicCache(config=model.config)
    turn = torch.tensor([[7, 8, 9]])
    wide = batch["input_ids"].shape[1]
    hidden = reference.withdrawal(model, reference.visual_mask(model, batch["input_ids"]), 4)
    whole = dict(batch, input_ids=torch.cat([batch["input_ids"], turn], 1))
    for name in ("attention_mask", "mm_token_type_ids"):
        whole[name] = torch.nn.functional.pad(batch[name], (0, 3), value=int(name == "attention_mask"))
    expected = reference.logits(model, whole, torch.nn.functional.pad(hidden, (0, 3)))[:, wide:]
    with pruned(model, 4):
        model(**batch, past_key_values=held, use_cache=True)
        for _ in range(2):
            said = model(input_ids=turn, attention_mask=whole["attention_mask"], past_key_values=held)
            parity.same(model, said.logits, expected)
            held.crop(-3)


@pytest.mark.parametrize(
    ("actions", "reason"),
    [
        ([{"at": 3, "action": "keep", "positions": "compact", "select": UNIFORM}], "start at 1 or earlier"),
        ([{"at": 4, "action": "keep", "select": KEEP | {"layer": "here"}}], "reads the keys of layer 2"),
    ],
)
def test_what_has_no_meaning_there_is_refused(actions, reason):
    with (
        pytest.raises(PruningError, match=reason),
        pruned(tiny_model(), schedule(*actions) | {"format_version": 2}),
    ):
        pass


def test_static_caches_are_refused():
    model = tiny_model()
    with pruned(model, 2), pytest.raises(PruningError, match="static caches do not go"):
        model.generate(**batch_of(), max_new_tokens=2, cache_implementation="static")


def test_costs_are_those_of_each_layer():
    from vtwcli.judge.flops import TextShape, kv_bytes, layer_cost

    shape = TextShape.from_config(tiny_model().config)
    assert [shape.of(d).kv_heads for d in range(LAYERS)] == [2, 2, 2, 0, 0, 0]
    assert [shape.of(d).head_dim for d in range(LAYERS)] == [8, 16, 8, 16, 8, 16]
    assert [shape.of(d).intermediate for d in range(LAYERS)] == [48, 48, 48, 96, 96, 96]
    assert kv_bytes(shape, [10] * LAYERS, 1) == 10 * 2 * 2 * (8 + 16 + 8)
    assert layer_cost(shape.of(3), 10, "macs-3mlp") == 10 * 2 * 32 * 64 + 2 * 100 * 64 + 3 * 10 * 32 * 96
