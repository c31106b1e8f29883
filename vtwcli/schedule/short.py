"""Short forms: one action that stands for several, expanded when a schedule is read.

- ``layers: "0-5, 9"`` or ``layers: [0, 1, 9]`` with ``mute`` and ``freeze``, in place of ``at`` and ``until``;
- ``columns: {beyond: 2}`` with ``mute``, in place of ``columns: beyond`` and ``steps: 2``;
- ``at: [8, 16, 24]`` with ``keep``, once for each layer; ``ratio``, ``count`` or ``above`` may then be lists as long.

The actions that they stand for are put in order by their layers, those at one layer as they were written. What is
written out never has short forms.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vtwcli.schedule.words import words

_MANY = 100_000  # layers; no model has a hundredth of it
_RANGES = ("mute", "freeze")


def layers_in(value: Any) -> tuple[int, ...]:
    """The layers that a list, or a text like ``"0-5, 9"``, names, in its order.

    Raises:
        ValueError: it names none.
    """
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, Sequence):
        raise ValueError(f"layers must be a list or a text like '0-5, 9', got {value!r}")
    found: list[int] = []
    for part in parts:
        if isinstance(part, int) and not isinstance(part, bool) and part >= 0:
            found.append(part)
            continue
        match = re.fullmatch(r"\s*(\d{1,6})\s*(?:-\s*(\d{1,6})\s*)?", part) if isinstance(part, str) else None
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last < _MANY:
            raise ValueError(f"layers: {part!r} is no layer, nor a range of layers like 0-5")
        found += range(first, last + 1)
    if len(set(found)) < len(found):
        raise ValueError(f"layers: {next(x for x in found if found.count(x) > 1)} is there twice")
    return tuple(found)


def spans(layers: Iterable[int]) -> list[tuple[int, int]]:
    """The runs of neighbours among layers: first, and first behind."""
    found: list[tuple[int, int]] = []
    for layer in sorted(set(layers)):
        if found and found[-1][1] == layer:
            found[-1] = found[-1][0], layer + 1
        else:
            found.append((layer, layer + 1))
    return found


def expanded(actions: Any) -> Any:
    """A list of actions without short forms; whatever is none stays as it is, for others to judge.

    Raises:
        ValueError: a short form that says nothing.
    """
    if not isinstance(actions, list | tuple):
        return actions
    found: list[Any] = []
    for number, action in enumerate(actions):
        try:
            found += _expanded(action)
        except ValueError as error:
            raise ValueError(f"action {number + 1}: {error}") from None
    return list(actions) if len(found) == len(actions) and found == list(actions) else _ordered(found)


def _expanded(action: Any) -> list[Any]:
    if not isinstance(action, Mapping):
        return [action]
    verb, at = action.get("action"), action.get("at")
    if verb == "mute" and isinstance(beyond := action.get("columns"), Mapping):
        if set(beyond) != {"beyond"} or "steps" in action:
            raise ValueError("columns must be a word, or {beyond: STEPS}")
        action = {**action, "columns": "beyond", "steps": beyond["beyond"]}
    if verb in _RANGES and "layers" in action:
        if "at" in action or "until" in action:
            raise ValueError(f"{verb} has layers, so at and until say nothing")
        rest = {key: value for key, value in action.items() if key != "layers"}
        return [
            {"at": first, "until": behind, **rest} for first, behind in spans(layers_in(action["layers"]))
        ]
    if verb != "keep" or not isinstance(at, list | tuple):
        return [action]
    layers, select = layers_in(at), action.get("select")
    return [{**action, "at": at, "select": _nth(select, i, len(layers))} for i, at in enumerate(layers)]


def _nth(select: Any, i: int, count: int) -> Any:
    if not isinstance(select, Mapping):
        return select
    found = dict(select)
    for word in words("amount"):
        amounts = found.get(word)
        if isinstance(amounts, list | tuple):
            if len(amounts) != count:
                raise ValueError(f"{word} has {len(amounts)} entries for {count} layers")
            found[word] = amounts[i]
    return found


def _ordered(actions: Sequence[Any]) -> list[Any]:
    """By layer; what starts at ``auto`` stays behind what is above it."""
    keyed, last = [], 0
    for action in actions:
        start = action.get("at") if isinstance(action, Mapping) else None
        if not isinstance(start, int):
            after = action.get("after") if isinstance(action, Mapping) else None
            start = after if isinstance(after, int) else last
        keyed.append((start, action))
        last = start
    return [action for _, action in sorted(keyed, key=lambda pair: pair[0])]
