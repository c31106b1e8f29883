"""Scores of the vision tower in every family, against the tower's attention by hand."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from tests import tower
from tests.tiny import TINY, VARIANTS
from vtwcli.models.families import FAMILIES, family_of, tower_of
from vtwcli.runtime import PruningError, pruned
from vtwcli.runtime.picture import Needs, Picked
from vtwcli.runtime.selectors import SELECTORS, Selector

MODELS = TINY | VARIANTS
REFUSED = [n for n, row in FAMILIES.items() if row.no_withdraw or row.no_tower]
WORKING = [n for n in MODELS if n not in REFUSED and not n.endswith("window")]


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
