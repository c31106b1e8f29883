"""Precedence of options, and what wrong recipes are told."""

import re

import pytest

from vtwcli.errors import UsageError
from vtwcli.recipe.recipe import CalibrateSection, Recipe
from vtwcli.recipe.settings import load_recipe


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return path

    return write


def test_defaults_without_a_recipe():
    assert load_recipe(None) == Recipe()
    assert Recipe().calibrate == CalibrateSection()


def test_set_beats_environment_beats_recipe_beats_default(write):
    path = write("calibrate: {eta: 0.1, limit: 7, seed: 5, policy: paper}")
    environment = {
        "VTW_CALIBRATE__ETA": "0.2",
        "VTW_CALIBRATE__LIMIT": "8",
        "VTW_HOME": "ignored",
        "ETA": "9",
    }
    found = load_recipe(path, ["calibrate.eta=3e-1"], environment).calibrate
    assert (found.eta, found.limit, found.seed, found.policy) == (0.3, 8, 5, "paper")
    assert found.bootstrap == CalibrateSection().bootstrap


def test_the_environment_sets_options_but_adds_no_step(write):
    recipe = load_recipe(
        write("model: demo\ncalibrate:"), [], {"VTW_EVAL__LIMIT": "7", "VTW_CALIBRATE__LIMIT": "8"}
    )
    assert (recipe.eval.limit, recipe.calibrate.limit) == (7, 8)
    assert ("eval" in recipe.model_fields_set, "calibrate" in recipe.model_fields_set) == (False, True)
    recipe = load_recipe(write("model: demo"), ["eval.seed=1"], {"VTW_EVAL__LIMIT": "7"})
    assert "eval" in recipe.model_fields_set
    assert (recipe.eval.limit, recipe.eval.seed) == (7, 1)


def test_yaml_1_2_numbers(write):
    assert load_recipe(write("calibrate: {eta: 1e-3}")).calibrate.eta == 1e-3


def test_short_forms(write):
    recipe = load_recipe(write("model: demo\ndata: ['demo:limit=3', {source: scienceqa}]"))
    assert recipe.model.name == "demo"
    assert [(spec.source, spec.limit) for spec in recipe.data] == [("demo", 3), ("scienceqa", None)]


def test_overrides_reach_into_the_short_form_of_the_model(write):
    model = load_recipe(write("model: demo"), ["model.dtype=bfloat16"], {"VTW_MODEL__DEVICE": "cpu"}).model
    assert (model.name, model.dtype, model.device) == ("demo", "bfloat16", "cpu")


def test_a_section_may_be_empty(write):
    recipe = load_recipe(write("model: demo\ndata:\neval:\nexport:"))
    assert {"eval", "export"} <= recipe.model_fields_set
    assert not {"data", "calibrate"} & recipe.model_fields_set
    assert recipe.eval == Recipe().eval


def test_built_in_names_are_no_paths(write, tmp_path):
    (tmp_path / "demo").mkdir()
    (tmp_path / "gqa").mkdir()
    recipe = load_recipe(write("model: demo\ndata: [demo, gqa]"))
    assert (recipe.model.name, [spec.source for spec in recipe.data]) == ("demo", ["demo", "gqa"])


def test_paths_are_relative_to_the_recipe(write, tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}")
    (tmp_path / "model").mkdir()
    (tmp_path / "gqa-copy").mkdir()
    (tmp_path / "k.yaml").write_text("actions: []")
    recipe = load_recipe(
        write(
            "model: {name: model}\ndata: [{source: rows.jsonl}, {source: gqa, path: gqa-copy}]\n"
            "schedule: {file: k.yaml}\noutput: results"
        )
    )
    assert recipe.data[1].path == str(tmp_path / "gqa-copy")
    assert recipe.schedule.file == str(tmp_path / "k.yaml")
    assert recipe.output == str(tmp_path / "results")
    assert recipe.model.name == str(tmp_path / "model")
    assert [spec.source for spec in recipe.data] == [str(tmp_path / "rows.jsonl"), "gqa"]


@pytest.mark.parametrize(
    ("text", "sets", "environment", "message"),
    [
        ("calibrat: {eta: 1}", [], {}, "recipe.yaml:1:1: calibrat: unknown key 'calibrat' (did you mean 'calibrate'?)"),
        ("calibrate:\n  etta: 1", [], {}, "recipe.yaml:2:3: calibrate.etta: unknown key 'etta' (did you mean 'eta'?)"),
        ("calibrate:\n  eta: -1", [], {}, ":2:3: calibrate.eta: input should be greater than 0, got -1"),
        ("calibrate:\n  eta: 1\n  eta: 2", [], {}, ':3:3: found duplicate key "eta"'),
        ("calibrate: {policy: best}", [], {}, ":1:13: calibrate.policy: input should be 'paper', 'sustained'"),
        ("calibrate: 3", [], {}, ":1:1: calibrate: input should be a valid dictionary"),
        ("- 1", [], {}, "a recipe must be a mapping of keys to values, not list"),
        ("data: ['demo:limit=x']", [], {}, ":1:8: data.0: data source 'demo:limit=x': limit: Input should be"),
        ("{}", ["calibrate.etta=3"], {}, "--set calibrate.etta=3: calibrate.etta: unknown key 'etta'"),
        ("{}", ["calibrate.eta"], {}, "--set calibrate.eta: not KEY=VALUE"),
        ("calibrate: {eta: 1}", ["calibrate.eta.x=1"], {}, "--set calibrate.eta.x=1: 'eta' is not a section"),
        ("export: {merged: true}", [], {}, ":1:1: export: merged goes with format onnx only"),
        ("gates: {max_dorp: 1}", [], {}, ":1:9: gates.max_dorp: unknown key 'max_dorp' (did you mean 'max_drop'?)"),
        ("{}", ["calibrate.eta=[1"], {}, "--set calibrate.eta=[1:1:3: expected"),
        ("{}", [], {"VTW_CALIBRATE__ETA": "x"}, "environment variable VTW_CALIBRATE__ETA: calibrate.eta: input should"),
    ],
)  # fmt: skip
def test_errors_name_the_place(write, text, sets, environment, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        load_recipe(write(text), sets, environment)
