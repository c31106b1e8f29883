"""Where an option's value comes from: command line > ``--set`` > environment > recipe file > default.

``--set calibrate.eta=1e-4`` and ``VTW_CALIBRATE__ETA=1e-4`` name a key of the recipe; their values are YAML.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vtwcli import documents
from vtwcli.errors import UsageError
from vtwcli.recipe import STEPS, Recipe

ENVIRONMENT_PREFIX = "VTW_"
_TRUST = "model.trust_remote_code"


def load_recipe(
    path: Path | None,
    sets: Iterable[str] = (),
    environment: Mapping[str, str] | None = None,
    trusted: bool | None = None,
) -> Recipe:
    """The recipe that a command starts from.

    A variable changes a step's options; only the file and ``--set`` make a step part of the recipe. Whether a model's
    code may run is for the user to say: the file alone, which may be somebody else's, cannot.

    Args:
        path: recipe file; None starts from the defaults. Relative paths inside it are relative to it.
        sets: ``KEY=VALUE`` texts of ``--set``, later ones win.
        environment: variables; those that begin with ``VTW_`` and hold ``__`` name a key.
        trusted: whether ``--trust-remote-code`` was given; None where no model will be opened.

    Raises:
        UsageError: naming file, line, column and key, or the override that is wrong.
    """
    from ruamel.yaml.comments import CommentedMap

    node = CommentedMap() if path is None else documents.read(path, "recipe")
    name = "options" if path is None else str(path)
    if not isinstance(node, dict):
        return documents.validate(node, Recipe, name, "recipe")
    origins: dict[str, str] = {}
    written = set(node)
    for variable, value in sorted((environment or {}).items()):
        key = variable.removeprefix(ENVIRONMENT_PREFIX)
        if variable.startswith(ENVIRONMENT_PREFIX) and "__" in key:
            dotted = key.lower().replace("__", ".")
            _assign(node, dotted, value, variable)
            origins[dotted] = f"environment variable {variable}"
    from_environment = set(node) - written
    for text in sets:
        dotted, equals, value = text.partition("=")
        if not equals or not dotted:
            raise UsageError(f"--set {text}: not KEY=VALUE", "for example --set calibrate.eta=1e-4")
        _assign(node, dotted, value, f"--set {text}")
        origins[dotted] = f"--set {text}"
        from_environment.discard(dotted.partition(".")[0])
    recipe = documents.validate(node, Recipe, name, "recipe", origins)
    if trusted is False and recipe.model.trust_remote_code and not {"model", _TRUST} & origins.keys():
        where = documents.position(tuple(_TRUST.split(".")), node)
        raise UsageError(
            f"{name}{where}: {_TRUST}: a recipe does not switch this on by itself",
            "add --trust-remote-code if you trust the code that comes with the model",
        )
    if trusted:
        recipe = recipe.model_copy(
            update={"model": recipe.model.model_copy(update={"trust_remote_code": True})}
        )
    for step in from_environment & set(STEPS):
        recipe.model_fields_set.discard(step)
    return recipe if path is None else recipe.relative_to(path.parent)


def check_recipe(path: Path) -> tuple[str, list[UsageError]]:
    """Look at a recipe file and at the schedule that it names, and at nothing else.

    Returns:
        The recipe's steps in words, and everything that is wrong, in order; a recipe that is wrong has no steps.
    """
    from vtwcli.schedule import Schedule
    from vtwcli.schedules import schedule_of
    from vtwcli.steps import step_problems, steps_of

    problems: list[UsageError] = []
    recipe = None
    try:
        recipe = load_recipe(path)
    except UsageError as error:
        problems += documents.all_problems(error)
    try:
        if recipe is not None:
            schedule_of(recipe.schedule)
        elif isinstance(file := _schedule_file(path), str):
            Schedule.from_file(path.parent / file)
    except UsageError as error:
        problems += documents.all_problems(error)
    if recipe is None:
        return "", problems
    problems += step_problems(recipe, str(path))
    has_steps = bool(recipe.model_fields_set & STEPS.keys())
    if problems:
        return "", problems
    return ", ".join(steps_of(recipe, str(path))) if has_steps else "no step for vtw run", []


def _schedule_file(path: Path) -> Any:
    """The schedule that a recipe names which is not valid otherwise; None where there is none to be found."""
    try:
        return documents.read(path, "recipe")["schedule"]["file"]
    except (UsageError, KeyError, TypeError, IndexError):
        return None


def _assign(node: Any, dotted: str, value: str, origin: str) -> None:
    """Put a YAML value at a dotted key, making the sections on the way."""
    *sections, last = dotted.split(".")
    for section in sections:
        if node.get(section) is None:
            node[section] = {}
        if section == "model" and isinstance(node[section], str):  # the short form
            node[section] = {"name": node[section]}
        node = node[section]
        if not isinstance(node, dict):
            raise UsageError(f"{origin}: {section!r} is not a section")
    node[last] = documents.parse(value, origin, "value")
