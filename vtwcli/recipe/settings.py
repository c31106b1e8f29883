"""Where an option's value comes from: command line > ``--set`` > environment > recipe file > default.

``--set calibrate.eta=1e-4`` and ``VTW_CALIBRATE__ETA=1e-4`` name a key of the recipe; their values are YAML.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vtwcli.errors import UsageError
from vtwcli.io import documents
from vtwcli.io.section import Section
from vtwcli.methods import METHODS
from vtwcli.recipe.recipe import STEPS, Recipe

ENVIRONMENT_PREFIX = "VTW_"
_TRUST = "model.trust_remote_code"


def load_recipe(
    path: Path | None,
    sets: Iterable[str] = (),
    environment: Mapping[str, str] | None = None,
    trusted: bool | None = None,
    method: str | None = None,
) -> Recipe:
    """The recipe that a command starts from.

    A variable changes a step's options; only the file and ``--set`` make a step part of the recipe. Whether a model's
    code may run is for the user to say: the file alone, which may be somebody else's, cannot.

    Args:
        path: recipe file; None starts from the defaults. Relative paths inside it are relative to it.
        sets: ``KEY=VALUE`` texts of ``--set``, later ones win.
        environment: variables; those that begin with ``VTW_`` and hold ``__`` name a key.
        trusted: whether ``--trust-remote-code`` was given; None where no model will be opened.
        method: of the schedule, in place of the file's own, so that ``sets`` may hold its parameters.

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
    if method in METHODS and method != "vtw":  # VTW's layer is an option of its own
        section = node.get("schedule")
        if not isinstance(section, dict) or section.get("method", method) != method:
            section = {}
        if "method" not in section:
            section = {key: one for key, one in section.items() if key not in ("file", "layer")}
        node["schedule"] = {**section, "method": method}
        origins["schedule.method"] = "--method"
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


def section_of(section: type[Section], given: dict[str, Any], base: Section) -> Any:
    """A recipe section with those of the command's options laid over it that were given (not None)."""
    options = {key: given[key] for key in section.model_fields if given.get(key) is not None}
    try:
        return section.model_validate(base.model_dump(exclude_unset=True) | options)
    except ValidationError as error:
        first = error.errors()[0]
        context = first.get("ctx", {})
        location = (*first["loc"], *context.get("below", ()))
        option = "--" + str(location[0]).replace("_", "-") if location else "options"
        message = first["msg"].removeprefix("Value error, ")
        value = context.get("given", first["input"])
        got = f", got {value!r}" if isinstance(value, str | int | float | bool) else ""
        raise UsageError(f"{option}: {message[:1].lower()}{message[1:]}{got}") from None
