"""The table of methods: what people and documents are told about each, read off the methods themselves."""

from __future__ import annotations

import inspect
import sys
from typing import Any

from pydantic import ValidationError
from pydantic_core import PydanticUndefined

from vtwcli.methods import METHODS
from vtwcli.methods.in_front import InFront
from vtwcli.methods.method import Grid, Method, Shape
from vtwcli.methods.subsets import Subset
from vtwcli.schedule import words
from vtwcli.schedule.schedule import Schedule
from vtwcli.schedule.sentences import describe

PUBLISHED = Shape(32)
"""The model that papers use: LLaVA-1.5-7B."""


def table() -> list[dict[str, str]]:
    """A row of strings for each method.

    Keys: ``method`` (its name for options), ``name``, ``paper``, ``chooses`` (where tokens are chosen), ``needs``,
    ``onnx`` (yes or no), ``calibrate`` (what a calibration finds) and ``default`` (parameters).
    """
    rows = []
    for key, method in METHODS.items():
        schedule = example(method, PUBLISHED)
        rows.append(
            {
                "method": key,
                "name": method.title,
                "paper": _source(method),
                "chooses": "before the LLM" if issubclass(method, InFront) else "in the LLM",
                "needs": _needs(schedule),
                "onnx": "no" if _onnx(schedule) else "yes",
                "calibrate": method.finds or "",
                "default": _defaults(method),
            }
        )
    return rows


def about(key: str, model: Shape | None = None) -> dict[str, Any]:
    """All of one method: its rule, its parameters, and its schedule in words for a model.

    Args:
        key: its name.
        model: by default that of the papers.
    """
    method, shape = METHODS[key], model or PUBLISHED
    refused = method.refused(shape) if model is not None else None
    schedule = None if refused else example(method, shape)
    return {
        "method": key,
        "name": method.title,
        "paper": _source(method),
        "about": _paragraphs(method),
        "parameters": [
            {
                "name": name,
                "default": None if field.default is PydanticUndefined else field.default,
                "help": field.description or "",
            }
            for name, field in method.model_fields.items()
        ],
        "refused": refused,
        "layers": shape.depth,
        "schedule": schedule.to_dict() if schedule else None,
        "sentences": [describe(action, shape.depth) for action in schedule.actions] if schedule else [],
        "onnx_reason": _onnx(example(method, PUBLISHED)),
    }


def example(method: type[Method], model: Shape) -> Schedule | None:
    """What its defaults make on a model; where it has none, the setting for half of the visual tokens, or one of those
    that are compared."""
    try:
        return method.of(()).fitted(model).schedule()
    except ValidationError:
        half = method.at_share(model, 0.5)
        if half is not None:
            return half.schedule()
        tried = method.compared(model, Grid((0.5,), 2, (0.4,), 0), {})
        return tried[len(tried) // 2].schedule if tried else None


def _paragraphs(method: type[Method]) -> list[str]:
    """The rule: the method's own line, and what its file says below the first, which is its title."""
    written = inspect.cleandoc(sys.modules[method.__module__].__doc__ or "").split("\n\n")[1:]
    parts = [inspect.cleandoc(method.__doc__ or "").split("\n\n")[0], *written]
    return [" ".join(part.split()).replace("``", "") for part in parts]


def _source(method: type[Method]) -> str:
    return method.paper or ("control" if issubclass(method, Subset) else "not verified")


def _needs(schedule: Schedule | None) -> str:
    found = [] if schedule is None else [word.needs for word in words.used(schedule.plain())]
    return ", ".join(dict.fromkeys(need for need in found if need)) or "nothing"


def _onnx(schedule: Schedule | None) -> str | None:
    found = [] if schedule is None else [word.onnx for word in words.used(schedule.plain())]
    return next((reason[0] for reason in found if reason), None)


def _defaults(method: type[Method]) -> str:
    given = {name: field.default for name, field in method.model_fields.items()}
    said = (
        f"{name}={_short(value)}" for name, value in given.items() if value not in (None, PydanticUndefined)
    )
    return ", ".join(said)


def _short(value: Any) -> str:
    """A default as a table shows it: shares like 64/576 to three digits."""
    if isinstance(value, tuple):
        return f"({', '.join(map(_short, value))})"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def markdown() -> str:
    """The table in Markdown, without a newline at the end."""
    head = ("Method", "Name", "arXiv", "Chooses", "Needs", "ONNX", "Calibration finds", "Defaults")
    lines = [head, tuple("---" for _ in head)]
    lines += [(f"`{row['method']}`", *list(row.values())[1:]) for row in table()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
