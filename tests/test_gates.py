"""Gates: each in both directions, and what was not measured."""

import pytest

from vtwcli.judge.gates import check, sentence
from vtwcli.recipe.recipe import GatesSection

ROW = {
    "worst_task": "caption",
    "worst_difference": -0.02,
    "kl_answer": 0.01,
    "top1_agreement": 0.95,
    "cost": {"convention": "flops", "flops_ratio": {"flops": 0.6, "macs-2mlp": 0.7}},
}


@pytest.mark.parametrize(
    ("gate", "found", "holds", "fails"),
    [
        ("max_drop", 0.02, 0.02, 0.019),
        ("max_kl", 0.01, 0.01, 0.009),
        ("min_agreement", 0.95, 0.95, 0.951),
        ("max_flops", 0.6, 0.6, 0.59),
    ],
)
def test_each_gate_holds_up_to_its_limit(gate, found, holds, fails):
    for allowed, passed in ((holds, True), (fails, False)):
        [judged] = check({"K=3": ROW}, GatesSection(**{gate: allowed}))
        assert (judged["found"], judged["allowed"], judged["passed"]) == (found, allowed, passed)
        assert (judged["schedule"], judged["task"]) == ("K=3", "caption" if gate == "max_drop" else None)


def test_every_limit_is_judged_for_every_schedule():
    limits = dict.fromkeys(GatesSection.model_fields, 0.5)
    judged = check({"a": ROW, "b": ROW}, GatesSection(**limits))
    names = [gate for gate in limits if gate != "confidence"]  # which is the risk's
    assert [(one["schedule"], one["gate"]) for one in judged] == [(s, gate) for s in "ab" for gate in names]
    assert check({"a": ROW}, GatesSection()) == []


def test_a_gain_is_no_drop():
    [judged] = check({"a": {**ROW, "worst_difference": 0.1}}, GatesSection(max_drop=0))
    assert (judged["found"], judged["passed"]) == (0, True)


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_what_was_not_measured_does_not_pass(missing):
    row = {**ROW, "worst_task": None, "worst_difference": None, "kl_answer": missing}
    drop, kl = check({"a": row}, GatesSection(max_drop=1, max_kl=1))
    assert (drop["passed"], kl["passed"]) == (False, False)
    assert sentence(drop) == "gate max_drop FAILED: a: drop not measured, allowed 1"
