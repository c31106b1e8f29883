"""Update, read, leave: what it proposes from a sweep's answers, and what a calibration of the demo model saves."""

import json
from pathlib import Path

import pytest

from tests.cli import vtw
from vtwcli.budget import budget
from vtwcli.calibrate import calibrate
from vtwcli.data.spec import DataSpec
from vtwcli.methods.method import Answers, Shape, Trial
from vtwcli.methods.stages import Stages
from vtwcli.recipe.recipe import BudgetSection, CalibrateSection, ModelSection, Recipe
from vtwcli.report.candidates import searched_sentence


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


def _grow(harm, cost, shape, limit=1.0):
    """What is chosen where ``harm(frozen, k)`` tells what a candidate does, and in how many passes it is found."""
    depth = shape.depth
    curves = [harm((), k) for k in range(depth)] + [harm((d,), depth - 1) for d in range(depth)]
    made = Stages.candidates(shape, Answers(curves, {"one": curves}, [], limit, False), {})
    tried, passes = [], 0
    while made:
        passes += 1
        for one in made:
            frozen, k = one.parameters["layers"], one.parameters["withdraw"]
            done = harm(frozen, k)
            tried.append(Trial(one, done, cost(frozen, k), done <= limit))
        made = Stages.further(shape, tried)
    names = [one.candidate.name for one in tried]
    assert len(set(names)) == len(names)
    best = min((one for one in tried if one.holds), key=lambda one: one.cost, default=None)
    return best and best.candidate.name, passes, len(tried)


def test_the_frozen_set_grows_by_what_layers_do_together():
    """Alone 5 and 6 do least, but not both; 0, 2, 3 do more, and all hold with one of them."""
    alone = [0.2, 9, 0.25, 0.3, 9, 0.01, 0.02, *[0.0] * 17]

    def harm(frozen, k):
        return sum(alone[d] for d in frozen) + 9 * ({5, 6} <= set(frozen)) + (9 if k < 20 else 0.1)

    def cost(frozen, k):
        return k - 0.8 * len(frozen)

    chosen, passes, count = _grow(harm, cost, Shape(24))
    assert chosen == "frozen 0,2-3,6-19, K=20"
    assert passes <= 6 and count <= 120


def test_withdrawal_comes_earlier_where_the_frozen_set_holds_there():
    """The sweep's levels do not name layer 9, and what comes before 6 is not allowed."""

    def harm(frozen, k):
        return 0.001 if k >= 9 else 0.9 if k >= 6 else 2

    assert _grow(
        lambda frozen, k: harm(frozen, k) if k != 6 else 2, lambda f, k: k - 0.8 * len(f), Shape(12)
    )[0] == ("frozen 0-6, K=7")
    assert _grow(harm, lambda frozen, k: k - 0.8 * len(frozen), Shape(12, 8))[0] == "frozen 0-7, K=8"
    assert _grow(lambda frozen, k: 5.0, lambda frozen, k: 1.0, Shape(12))[0] is None


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


def test_a_guarantee_tests_candidates_on_samples_that_did_not_make_them(tiny_dir, data):
    """With a loss that nothing exceeds the front holds to its cheapest, every layer frozen and left at once."""
    given = {"policy": "guarantee", "risk": 0.8, "confidence": 0.8, "loss": "kl", "eta": 1000.0}
    options = CalibrateSection(**given, limit=3, max_new_tokens=3, method="stages")
    found = calibrate(ModelSection(name=str(tiny_dir)), [DataSpec(source=str(data))], options)
    said = found["guarantee"]
    assert [one["candidate"] for one in said["tested"]] == found["pareto"][::-1]
    assert found["chosen"] == found["pareto"][0]
    assert found["parameters"] == {"layers": [0], "withdraw": 1}
    assert found["schedule"]["actions"] == [
        {"at": 0, "until": 1, "action": "freeze"},
        {"at": 1, "action": "withdraw"},
    ]
    assert "Promised with 80 % confidence" in searched_sentence(found)
    alone = [row for row in found["candidates"] if row["accepted"] and row["parameters"]["layers"] == []]
    assert ("withdrawal alone" in searched_sentence(found)) == bool(alone)


def test_a_comparison_has_them(tiny_dir, data):
    found = budget(
        ModelSection(name=str(tiny_dir)),
        [DataSpec(source=str(data))],
        BudgetSection(methods=("vtw", "stages"), limit=1, max_new_tokens=2),
    )
    rows = {row["name"]: row for row in found["candidates"]}
    same = [
        (row, rows[f"K={row['parameters']['withdraw']}"])
        for row in rows.values()
        if row["method"] == "stages"
    ]
    assert same and all(both["flops_ratio"]["flops"] < plain["flops_ratio"]["flops"] for both, plain in same)
    assert all(both["kv_ratio"] == plain["kv_ratio"] for both, plain in same)
