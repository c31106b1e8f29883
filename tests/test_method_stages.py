"""Update, read, leave: what it proposes from a sweep's answers, and what a calibration of the demo model saves."""

import json
from pathlib import Path

import pytest

from tests.cli import vtw
from vtwcli.methods.method import Answers, Shape
from vtwcli.methods.stages import Stages
from vtwcli.recipe.recipe import Recipe


def test_frozen_layers_lie_in_front_of_withdrawal():
    with pytest.raises(ValueError, match="layers: 4 is not in front of withdraw, 4"):
        Stages(layers="2-4", withdraw=4)
    with pytest.raises(ValueError, match="layers: 4 is not in front of withdraw, 4"):
        Recipe.model_validate({"schedule": {"method": "stages", "layers": [4], "withdraw": 4}})


def test_what_is_tried():
    withdrawal, alone = [9.0, 1.0, 0.02, 0.005, 0.006, 0.0001], [0.5, 0.001, 0.2, 0.01, 0.002, 0.0]
    found = Answers(withdrawal + alone, {"one": withdrawal + alone}, [], 0.01, False)
    made = Stages.candidates(Shape(6), found, {})
    assert {one.parameters["withdraw"] for one in made} == {1, 2, 3, 5}  # 128, 4, 1 and 1/16 times eta
    names = [one.name for one in made]
    assert len(set(names)) == len(names)
    assert {"frozen none, K=5", "frozen 2-4, K=5", "frozen 1,3-4, K=5", "frozen 1,4, K=5"} <= set(names)
    assert all(one.parameters["withdraw"] >= 3 for one in Stages.candidates(Shape(6, 3), found, {}))


def test_the_demo_is_as_safe_at_two_thirds_of_the_work(tmp_path, monkeypatch):
    """By the same policy on the same samples as VTW's K; both documents say what it costs."""
    monkeypatch.chdir(tmp_path)
    for method in ("vtw", "stages"):
        given = ("--method", method, "--limit", "6", "--bootstrap", "0", "--output", f"{method}.json")
        assert vtw("calibrate", "demo", *given).code == 0
    plain, both = (json.loads(Path(f"{name}.json").read_text()) for name in ("vtw", "stages"))
    [row] = [one for one in both["candidates"] if one["name"] == both["chosen"]]
    assert row["accepted"] and row["worst_kl"] <= both["eta"] == plain["eta"]
    assert both["policy"] == plain["policy"]
    assert row["flops_ratio"]["flops"] <= 0.65 * plain["cost"]["flops_ratio"]["flops"]
    assert both["parameters"] == row["parameters"]
