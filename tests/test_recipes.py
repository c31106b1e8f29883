"""The recipes that come with the project are valid and say what the papers say."""

from pathlib import Path

import pytest

from vtwcli.settings import load_recipe

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_valid(path):
    recipe = load_recipe(path)
    assert "name" in recipe.model.model_fields_set
    assert recipe.data


@pytest.mark.parametrize(
    ("name", "eta"),
    [("llava-1.5-7b-paper", 3e-3), ("llava-1.5-13b-paper", 5e-4), ("llava-next-7b-paper", 1e-4)],
)
def test_published_thresholds(name, eta):
    [path] = [path for path in RECIPES if path.stem == name]
    found = load_recipe(path).calibrate
    assert (found.eta, found.policy, found.positions, found.limit) == (eta, "paper", "first", 20)
