"""Methods at equal cost: settings that come to an average number of visual tokens, and their views."""

from __future__ import annotations

import json

import pytest
from rich.console import Console

from tests.cli import vtw
from vtwcli.budget import at_equal_cost, budget
from vtwcli.data.spec import DataSpec
from vtwcli.errors import UsageError
from vtwcli.methods import METHODS
from vtwcli.methods.in_front import InFront
from vtwcli.methods.method import Shape
from vtwcli.recipe.recipe import BudgetSection, ModelSection
from vtwcli.report.equal import blocks, equal_markdown, equal_table, plot_equal


@pytest.mark.parametrize("depth", [12, 32, 40])
@pytest.mark.parametrize("share", [1 / 3, 2 / 9, 1 / 9])
@pytest.mark.parametrize("name", METHODS)
def test_a_setting_comes_to_its_share(name, share, depth):
    """Counted by the schedule itself at 576 tokens; withdrawal is bound to whole layers."""
    method = METHODS[name].at_share(Shape(depth), share)
    if method is None:
        return
    if isinstance(method, InFront):  # of each image, in front of all layers; VScan leaves some later
        first, *later = method.schedule().plain()
        ratio = first["select"]["ratio"]
        for one in later:
            ratio = (one["at"] * ratio + (depth - one["at"]) * ratio * one["select"]["ratio"]) / depth
        assert ratio == pytest.approx(share)
        return
    counts = method.schedule().visual_per_layer(depth, 576)
    slack = 1 / depth if name == "vtw" else 4 / 576
    average = sum(counts) / depth / 576
    assert share - slack <= average <= share + 4 / 576


@pytest.mark.parametrize("name", [name for name, one in METHODS.items() if issubclass(one, InFront)])
def test_a_method_of_the_tower_is_left_out_with_its_reason(name):
    options = BudgetSection(tokens=(3,), methods=(name, "uniform"))
    found = at_equal_cost(Shape(6, tower=None), options, 9)
    [left] = found.left_out
    assert (left["method"], left["tokens"]) == (name, [3.0])
    assert left["why"] == "the vision tower of this family has no scores"


@pytest.fixture(scope="module")
def compared(tiny_dir, data):
    options = BudgetSection(
        limit=2, tokens=(3, 6), max_new_tokens=3, methods=("vtw", "fastv", "random", "vica")
    )
    return budget(ModelSection(name=str(tiny_dir)), [DataSpec(source=str(data))], options)


def test_every_method_stands_at_the_same_cost(compared):
    assert [row["name"] for row in compared["candidates"]] == [
        "vtw 6",
        "fastv 6",
        "random 6",
        "vtw 3",
        "fastv 3",
        "random 3",
    ]
    for row in compared["candidates"]:
        average = sum(row["visual_tokens"]) / 6
        assert row["tokens"] - 1.5 <= average <= row["tokens"] + 1, row["name"]
        assert row["scores"].keys() == compared["scores"].keys() == {"colour", "caption"}
    [left] = compared["left_out"]
    assert (left["method"], left["tokens"]) == ("vica", [6.0, 3.0])


def test_scores_are_those_of_an_evaluation(compared, tiny_dir, data, tmp_path):
    """The same schedules, judged by the command that is there for it."""
    from vtwcli.evaluate import evaluate
    from vtwcli.recipe.recipe import EvalSection
    from vtwcli.schedule.schedule import Schedule

    named = [(row["name"], Schedule.from_dict(row["schedule"])) for row in compared["candidates"]]
    options = EvalSection(limit=2, max_new_tokens=3, bootstrap=0, timing=False)
    found, _ = evaluate(ModelSection(name=str(tiny_dir)), named, [DataSpec(source=str(data))], options)
    for task, one in compared["scores"].items():
        assert one["value"] == found["tasks"][task]["full"]["mean"]
        for row in compared["candidates"]:
            assert row["scores"][task] == found["tasks"][task]["schedules"][row["name"]]["mean"]
    for row in compared["candidates"]:
        assert row["kl"] == pytest.approx(found["schedules"][row["name"]]["kl_answer"], rel=1e-4, abs=1e-9)


def test_the_best_of_each_block_is_marked(compared, tmp_path):
    for target, lines in blocks(compared):
        rows = [row for row in compared["candidates"] if row["tokens"] == target]
        best = [row["method"] for row in rows if row["kl"] == min(one["kl"] for one in rows)]
        assert [line[0][0] for line in lines if line[3][1]] == best
    console = Console(width=120, record=True)
    console.print(equal_table(compared))
    assert "full model" in console.export_text()
    assert "Not there at 6, 3: vica; no setting" in equal_markdown(compared)
    plot_equal(compared, tmp_path / "equal.svg")
    assert "methods at equal cost" in (tmp_path / "equal.svg").read_text()


def test_command(tiny_dir, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = [
        "budget",
        tiny_dir,
        "--data",
        data,
        "--limit",
        "1",
        "--methods",
        "vtw,uniform",
        "--max-new-tokens",
        "1",
    ]
    done = vtw(*given, "--tokens", "6,3", "--json", "--output", "out.json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["options"]["tokens"] == [6.0, 3.0]
    many = vtw(*given, "--tokens", "9", "--output", "more.json")
    assert (many.code, many.err.splitlines()[-1]) == (
        2, "error: --tokens: 9 is not fewer than the 9 visual tokens that a prompt has"
    )  # fmt: skip
    none = vtw(*given[:6], "--methods", "exit", "--tokens", "3", "--output", "none.json")
    assert none.code == 2 and "none of the methods has a setting" in none.err
    with pytest.raises(UsageError):
        at_equal_cost(Shape(6), BudgetSection(tokens=(12,)), 9)


def test_methods_are_listed():
    done = vtw("methods", "--json")
    rows = json.loads(done.out)
    assert [row["method"] for row in rows] == list(METHODS)
    assert {row["onnx"] for row in rows} == {"yes", "no"}
    assert next(row for row in rows if row["method"] == "fastv")["needs"] == "last row"


@pytest.mark.parametrize("name", METHODS)
def test_a_method_tells_its_rule_and_its_schedule(name):
    found = json.loads(vtw("methods", name, "--json").out)
    assert found["about"] and found["sentences"], found
    shown = vtw("methods", name, "demo")
    assert shown.code == 0 and METHODS[name].title in shown.out


def test_an_unknown_method_is_named():
    done = vtw("methods", "fastest")
    assert (done.code, done.out) == (2, "")
    assert (
        done.err.startswith("error: 'fastest' is not a method; one of vtw, visipruner")
        or "one of vtw" in done.err
    )


def test_no_two_methods_are_drawn_alike():
    drawn = [method.style[:2] for method in METHODS.values()]
    assert len(set(drawn)) == len(drawn)
    assert len({method.style.label for method in METHODS.values()}) == len(METHODS)
