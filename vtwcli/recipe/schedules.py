"""Which schedules a command runs: files, withdrawal layers, or a method with its parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vtwcli.errors import UsageError
from vtwcli.methods.method import Method, Shape
from vtwcli.methods.visipruner import Rule
from vtwcli.recipe.recipe import ModelSection, Recipe, ScheduleSection
from vtwcli.recipe.settings import section_of
from vtwcli.schedule.schedule import Schedule

_FLAGS = tuple(Rule.model_fields)  # parameters that are options of commands


def schedule_of(section: ScheduleSection, model: ModelSection | None = None) -> tuple[str, Schedule] | None:
    """Name and schedule of a recipe's section; None where it names none.

    Args:
        model: to whose depth published numbers are scaled; None: they stay what they are.

    Raises:
        UsageError: the file cannot be read or holds no schedule.
        NotFoundError: the model is not there.
    """
    if section.file is not None:
        path = Path(section.file)
        return path.stem.removesuffix(".schedule"), Schedule.from_file(path)
    method = section.chosen()
    if method is not None and model is not None and type(method).fitted is not Method.fitted:
        method = method.fitted(shape_of(model))
    return None if method is None else (method.label(), method.schedule())


def shape_of(model: ModelSection) -> Shape:
    """What methods need to know of a model; its config alone is read.

    Raises:
        NotFoundError: the model is not there, or not supported.
    """
    from vtwcli.models.hub import resolve

    found = resolve(model.name, trust_remote_code=model.trust_remote_code, weights=False)
    return Shape.of(found.family, found.config)


def schedules_of(
    given: Mapping[str, Any], recipe: Recipe, model: ModelSection | None = None
) -> list[tuple[str, Schedule]]:
    """Names and schedules that a command's options name, else that of the recipe, else none.

    Args:
        given: the options: ``schedule`` (a path or several), ``layer``, ``layers`` (``"4,6,8"``), ``method`` and its
            parameters.
        recipe: whose ``schedule`` section they override.
        model: see ``schedule_of``.

    Raises:
        UsageError: a layer that is no number, a method without what it needs, or parameters without the method.
    """
    paths = given.get("schedule") or ()
    paths = [paths] if isinstance(paths, Path) else list(paths)
    layers = [] if given.get("layer") is None else [int(given["layer"])]
    for part in (given.get("layers") or "").split(",") if given.get("layers") else ():
        if not part.strip().isdigit():
            raise UsageError(f"--layers: {part!r} is not a layer number", "for example --layers 8,12,16")
        layers.append(int(part))
    if any(k < 0 for k in layers):
        raise UsageError(f"--layer: {min(layers)} is not a layer number")
    method = given.get("method")
    if method == "vtw" and not layers:
        raise UsageError(
            "--method vtw needs a layer", "give --layer K; vtw calibrate finds it and writes its schedule"
        )
    named = [ScheduleSection(file=str(path)) for path in paths] + [ScheduleSection(layer=k) for k in layers]
    parameters = {name: given[name] for name in _FLAGS if given.get(name) is not None}
    base = recipe.schedule
    if method is not None and method != "vtw":
        if base.method != method:  # the flags' parameters may stand in a recipe without their method
            base = ScheduleSection(
                **{name: getattr(base, name) for name in _FLAGS if name in base.model_fields_set}
            )
        named.append(section_of(ScheduleSection, {"method": method, **parameters}, base))
    elif not named and base.names_one:
        named.append(section_of(ScheduleSection, parameters, base))
    if parameters and not any(section.method == "visipruner" for section in named):
        option = "--" + next(iter(parameters)).replace("_", "-")
        raise UsageError(f"{option} is a parameter of VisiPruner", "add --method visipruner")
    found = [(section, one) for section in named if (one := schedule_of(section, model)) is not None]
    if found and model is not None:
        _check_depth(found, model)
    return [one for _, one in found]


def _check_depth(found: Sequence[tuple[ScheduleSection, tuple[str, Schedule]]], model: ModelSection) -> None:
    """Hold schedules against the model before its weights are read; the option or file is named that is wrong."""
    shape = shape_of(model)
    for section, (_, schedule) in found:
        try:
            schedule.check_depth(shape.depth, shape.first_withdrawal)
        except UsageError as error:
            if section.layer is not None:
                at = f"--layer: {section.layer}"
                if section.layer > shape.depth:
                    raise UsageError(
                        f"{at}, but {model.name} has {shape.depth} layers (0..{shape.depth - 1})"
                    ) from None
                raise UsageError(
                    f"{at}, but {model.name} still adds vision in layers 0..{shape.first_withdrawal - 1}",
                    error.hint,
                ) from None
            origin = section.file or f"--method {section.method}"
            raise UsageError(f"{origin}: {error.message}", error.hint) from None
