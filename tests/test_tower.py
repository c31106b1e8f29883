"""Scores of the vision tower in every family, against the tower's attention by hand."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from transformers import DynamicCache

from tests import parity, slow_schedule, tower
from tests.tiny import TINY, VARIANTS
from vtwcli.models.families import FAMILIES, family_of, tower_of
from vtwcli.runtime import PruningError, apply, pruned, remove
from vtwcli.runtime.picture import Needs, Picked
from vtwcli.runtime.selectors import SELECTORS, Selector

MODELS = TINY | VARIANTS
REFUSED = [n for n, row in FAMILIES.items() if row.no_withdraw or row.no_tower]
WORKING = [n for n in MODELS if n.partition("-")[0] not in REFUSED and not n.endswith("window")]


@cache
def model_of(name: str):
    return MODELS[name].build(dtype=torch.float64)


def schedule(score: str, **select) -> dict:
    keep = {"at": 0, "action": "keep", "select": {"score": score, **select}}
    return {"format_version": 2, "actions": [keep]}


@pytest.fixture
def seen(monkeypatch):
    """The pictures that the selectors get, with the numbers of all layers."""
    pictures = []

    def choose(picture, count, **parameters):
        pictures.append(picture)
        return Picked(torch.arange(count))

    for score, needs in (("tower_cls", Needs(cls=(0, -1))), ("tower_received", Needs(received=(0, -1)))):
        monkeypatch.setitem(SELECTORS, score, Selector(choose, lambda p, needs=needs: needs))
    return pictures


@torch.no_grad()
@pytest.mark.parametrize("rows", ["t3 i t5", "t2 i t3 i t2"])
@pytest.mark.parametrize("name", WORKING)
def test_numbers_of_visual_tokens(name, rows, seen):
    model = model_of(name)
    batch = MODELS[name].batch([rows], seed=3, dtype=torch.float64)
    got = numbers(name, model, batch, seen, "tower_received")
    assert len(got) >= rows.count("i")
    expected = tower.scores(model, batch, [len(picture.embeds) for picture in got])
    for layer, wanted in expected.received.items():
        joined = torch.cat([picture.received[layer] for picture in got])
        torch.testing.assert_close(joined, wanted, rtol=0, atol=1e-9)
    for picture in got:
        assert picture.grid is None or picture.grid[0] * picture.grid[1] == len(picture.embeds)
    if tower_of(family_of(model.config), model.config) == "class token":
        got = numbers(name, model, batch, seen, "tower_cls")
        for layer, wanted in expected.cls.items():
            joined = torch.cat([picture.cls[layer] for picture in got], 1)
            torch.testing.assert_close(joined, wanted, rtol=0, atol=1e-9)
    else:
        with pytest.raises(PruningError, match="has no class token"):
            numbers(name, model, batch, seen, "tower_cls")


def numbers(name, model, batch, seen, score) -> list:
    """The pictures of a call."""
    seen.clear()
    with pruned(model, schedule(score, count=1)):
        model(**batch)
    return list(seen)


TWO = schedule("tower_received", count=2)
ROWS = ["t3 i t5", "t2 i t3 i t2", "t6"]


@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "gemma3", "pixtral"])
def test_images_of_all_numbers_in_one_batch(name):
    kind = MODELS[name]
    batch = kind.batch(ROWS, dtype=torch.float64)
    if name == "pixtral":  # its row breaks are text between the tokens of one image
        with pruned(model_of(name), TWO) as running, torch.no_grad():
            model_of(name)(**batch)
        assert [len(images) for images in running.trace.samples[1].actions[0].images] == [2, 2]
        return
    tokens, scores, decided = slow_schedule.greedy(
        model_of(name), batch, TWO["actions"], 4, count_positions=not kind.own_positions
    )
    out, logits = parity.generated(model_of(name), batch, TWO, 4)
    assert torch.equal(out.sequences[:, -4:], tokens)
    parity.same(model_of(name), logits, scores)
    with pruned(model_of(name), TWO) as running, torch.no_grad():
        model_of(name)(**batch)
    samples = running.trace.samples
    assert [sample.actions[0].kept for sample in samples] == decided.kept[0]
    assert [sample.visual_per_layer[0] for sample in samples] == [2, 4, 0]
    assert [len(samples[row].actions[0].images) for row in range(3)] == [1, 2, 0]
    assert samples[0].actions[0].positions == ("original" if kind.own_positions else "compact")


@torch.no_grad()
@pytest.mark.parametrize("name", ["llava", "internvl", "qwen2_5_vl"])
def test_beams_copies_and_steps_without_a_cache(name):
    model = model_of(name)
    batch = MODELS[name].batch(["t3 i t5", "t2 i t4"], dtype=torch.float64)
    with pruned(model, TWO):
        options = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False}
        assert torch.equal(
            model.generate(**batch, **options), model.generate(**batch, **options, use_cache=False)
        )
        expected = model(**batch).logits
    apply(model, TWO)
    twin = copy.deepcopy(model)
    remove(model)
    assert torch.equal(twin(**batch).logits, expected)
    assert not torch.equal(model(**batch).logits, expected)
    assert "get_image_features" not in vars(model.model)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llava", "llava_next"])
def test_a_second_turn_with_an_image(name):
    model, cached = model_of(name), DynamicCache()
    first = MODELS[name].batch(["t3 i t5"], seed=1, dtype=torch.float64)
    second = MODELS[name].batch(["t2 i t4"], seed=7, dtype=torch.float64)
    pictures = ("pixel_values", "image_sizes")
    whole = {key: torch.cat([first[key], second[key]], 0 if key in pictures else 1) for key in first}
    with pruned(model, TWO):
        model(**first, past_key_values=cached)
        given = {**second, "attention_mask": whole["attention_mask"]}
        logits = model(**given, past_key_values=cached).logits
        parity.same(model, logits[:, -1], model(**whole).logits[:, -1])
        cached.crop(-2)
        again = model(input_ids=second["input_ids"][:, -2:], past_key_values=cached).logits
    parity.same(model, again[:, -1], logits[:, -1])


@pytest.mark.parametrize("name", sorted({n for n, row in FAMILIES.items() if row.no_tower}))
def test_families_whose_towers_have_no_scores(name):
    with pytest.raises(PruningError, match="no scores of the vision tower"), pruned(model_of(name), TWO):
        pass


@torch.no_grad()
def test_what_the_tower_was_not_seen_to_make_is_refused():
    model = model_of("qwen2_vl")
    with pruned(model, TWO), pytest.raises(PruningError, match="and not with videos"):
        model(**MODELS["qwen2_vl"].batch(["t2 v t3"], dtype=torch.float64))
    model, batch = model_of("llava"), MODELS["llava"].batch(["t3 i t5"], dtype=torch.float64)
    features = model.model.get_image_features(batch.pop("pixel_values"))
    with pruned(model, TWO), pytest.raises(PruningError, match="pixel_values in the same call"):
        model(**batch, mm_encoder_outputs={"image": features})
    with pytest.raises(PruningError, match="layer -3 of a vision tower that has 2"):
        apply(model, schedule("tower_received", count=2, parameters={"layer": -3}))
    assert "get_image_features" not in vars(model.model)
