"""The rules of a schedule: the keys of an action, what they hold, how they go together, and whether a model has room.

Both who reads a schedule that a person wrote and who executes one on a model ask here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vtwcli.schedule.words import (
    ALL_ROWS,
    FORMAT_VERSION,
    GUIDE,
    HIDDEN,
    KEYED,
    LAST_ROW,
    MUTED,
    OF_ATTENTION,
    REST_INTO,
    REST_SHARE,
    SELECTED,
    TOWER,
    ScheduleError,
    given,
    leaves,
    row,
    version_of,
    words,
)


@dataclass(frozen=True)
class Key:
    """What a key holds.

    Attributes:
        kind: of its value; ``str``: a word of the key's own slot, or any text where it has none; ``dict``: keys of
            their own, under the key's name, and ``parameters`` under the score's.
        default: ``...`` where it is required; None: nothing.
        least, most: bounds of a number.
        auto: whether the word ``auto`` does too.
    """

    kind: type
    default: Any = None
    least: float | None = None
    most: float | None = None
    auto: bool = False


_START = {"at": Key(int, ..., 0, auto=True), "after": Key(int, None, 0), "when": Key(dict)}
_SPAN = {"at": Key(int, ..., 0), "until": Key(int, ..., 1)}

KEYS: dict[str, dict[str, Key]] = {
    "withdraw": _START,
    "keep": {
        **_START,
        "select": Key(dict, ...),
        "positions": Key(str, words("positions")[0]),
        "rest": Key(dict),
        "every": Key(int, None, 1),
    },
    "mute": {
        **_SPAN,
        **{slot: Key(str, words(slot)[0]) for slot in MUTED},
        "steps": Key(int, 1, 0),
        "both_ways": Key(bool, False),
    },
    "freeze": _SPAN,
    "when": {
        "cosine_below": Key(float, None, -1, 1),
        "cosine_above": Key(float, None, -1, 1),
        "attention_below": Key(float, None, 0, 1),
        "layers": Key(int, 1, 1),
        "consecutive": Key(bool, False),
    },
    "select": {
        "score": Key(str, ...),
        "ratio": Key(float, None, 0, 1),
        "count": Key(int, None, 0),
        "share": Key(float, None, 0, 1),
        "above": Key(float),
        "found": Key(bool, None),
        "seed": Key(int, 0),
        **{slot: Key(str, words(slot)[0]) for slot in SELECTED},
        "heads": Key(int, None, 1),
        "level": Key(bool, False),
        "parameters": Key(dict),
    },
    "rest": {
        "merge": Key(str, ...),
        "share": Key(float, REST_SHARE, 0, 1),
        "into": Key(float, REST_INTO, 0, 1),
        "seed": Key(int, 0),
    },
    "guided": {"guide": Key(str)},  # a model's name
    # parameters of scores; layers are those of the vision tower, and below 0 they count from its end
    "tower_cls": {"first": Key(int, -2), "last": Key(int, -2)},
    "tower_received": {"layer": Key(int, -2), "per": Key(str, words("per")[0])},
    "tower_visionzip": {"contextual": Key(int, None, 0)},
    "tower_prumerge": {"neighbours": Key(int, 32, 0)},
    "tower_prumerge_plus": {"neighbours": Key(int, 32, 0)},
    "tower_cdpruner": {"relevance_weight": Key(float, 0.5, 0, 1), "negated": Key(bool, False)},
    "tower_vispruner": {"important": Key(float, 0.5, 0, 1)},
    # the object layer is that of a tower with 24 layers, scaled
    "tower_hiprune": {"alpha": Key(float, 0.1, 0, 1), "object_layer": Key(int, 8, 0, 23)},
    "tower_vscan": {"side": Key(int, 4, 1)},
    "tower_holov": {"crops": Key(int, 16, 1), "weight": Key(float, 0.09, 0)},
}
"""The keys of each action, of ``when``, of ``select`` and of ``rest``, and the parameters of scores."""


def check_rules(part: str, data: Mapping[str, Any]) -> None:
    """Hold the keys of an action, of ``when`` or of ``select`` against each other; each by itself is right.

    Raises:
        ScheduleError: they do not go together.
    """
    if part in ("mute", "freeze"):
        at, until = data["at"], data["until"]
        if until <= at:
            raise ScheduleError(f"'until' ({until}) must be above 'at' ({at}); it is the first layer without")
        if part == "mute":
            _check_beyond(data)
    elif part in ("withdraw", "keep"):
        if data["at"] == "auto" and data.get("when") is None:
            raise ScheduleError("'at: auto' needs a condition under 'when'")
        if data["at"] != "auto" and not (data.get("when") is None and data.get("after") is None):
            raise ScheduleError("'when' and 'after' go with 'at: auto' only")
        if in_front(data) and data["at"] != 0:
            raise ScheduleError("scores of the vision tower choose in front of layer 0; give 'at: 0'")
        if data["at"] == "auto":
            _check_auto(data.get("select"))
        if data.get("rest") is not None:
            _check_rest(data)
        if data.get("every") is not None:
            _check_every(data)
    elif part == "when":
        _one_of("condition", data)
    elif part == "select":
        _one_of("amount", data)
        score = row("score", data["score"])
        if data.get("above") is not None and score.needs in (None, TOWER, KEYED, GUIDE):
            raise ScheduleError(f"score {data['score']} has no threshold; give ratio or count")
        if data.get("found") is not None and not (data["found"] and score.finds):
            raise ScheduleError(f"score {data['score']} finds no number of tokens; give ratio or count")
        if score.needs != LAST_ROW and (said := said_of(part, data, (*SELECTED, *OF_ATTENTION))):
            raise ScheduleError(f"score {data['score']} is no attention, so '{said[0]}' says nothing")
        if data["score"] != "attention" and (said := said_of(part, data, ("rows", *OF_ATTENTION))):
            raise ScheduleError(f"score {data['score']} is the last row's; '{said[0]}' goes with attention")
        parameters(data)


def _check_every(data: Mapping[str, Any]) -> None:
    amount = data["select"] if isinstance(data["select"], Mapping) else vars(data["select"])
    wrong = any(amount.get(key) is not None for key in ("above", "share", "found"))
    if data["at"] == "auto" or row("score", amount["score"]).needs != LAST_ROW or wrong:
        raise ScheduleError(
            "'every' wants a fixed layer, and attention or contribution with a ratio or a count"
        )
    if said := said_of("select", amount, (*SELECTED, *OF_ATTENTION)):
        raise ScheduleError(f"'every' looks at the newest token in the layer before; leave out '{said[0]}'")
    if said := said_of("keep", data, ("positions", "rest")):
        raise ScheduleError(f"'every' takes entries of the cache away; leave out '{said[0]}'")


def _check_beyond(data: Mapping[str, Any]) -> None:
    beyond = data.get("columns") == "beyond"
    if beyond and (data.get("readers") != "visual" or data.get("sink", "renormalise") != "renormalise"):
        raise ScheduleError("'columns: beyond' goes with 'readers: visual' and 'sink: renormalise' only")
    if not beyond and (data.get("steps", 1) != 1 or data.get("both_ways")):
        raise ScheduleError("'steps' and 'both_ways' go with 'columns: beyond' only")


def _check_rest(data: Mapping[str, Any]) -> None:
    """Merged rows stand for tokens of a rank, at positions of their own."""
    select = data["select"] if isinstance(data["select"], Mapping) else vars(data["select"])
    if data["positions"] != "compact":
        raise ScheduleError(
            "merged tokens ('rest') have no place among original positions; say positions: compact"
        )
    if row("score", select["score"]).needs not in (LAST_ROW, HIDDEN) or select.get("above") is not None:
        raise ScheduleError(
            "'rest' ranks the tokens that are not kept; give a measured score, and a number of tokens"
        )
    if data["at"] == "auto":
        raise ScheduleError("'rest' needs a layer, not 'at: auto'")


def said_of(part: str, data: Mapping[str, Any], keys: Iterable[str]) -> list[str]:
    """Which of a part's keys hold something else than their defaults."""
    return [key for key in keys if data.get(key) not in (None, KEYS[part][key].default)]


def _check_auto(select: Any) -> None:
    """What ``auto`` looks at is the last row of the layers behind it."""
    data = select if isinstance(select, Mapping) or select is None else vars(select)
    if data is not None and (said := said_of("select", data, (*SELECTED, *OF_ATTENTION))):
        raise ScheduleError(f"'{said[0]}: {data[said[0]]}' needs a layer, not 'at: auto'")
    if data is not None and row("score", data["score"]).needs in (HIDDEN, KEYED, ALL_ROWS):
        raise ScheduleError(f"score {data['score']} needs a layer, not 'at: auto'")


def _one_of(slot: str, data: Mapping[str, Any]) -> None:
    if len(given(slot, data)) != 1:
        *others, last = words(slot)
        raise ScheduleError(f"give exactly one of {', '.join(others)} and {last}")


def in_front(action: Mapping[str, Any]) -> bool:
    """Whether an action chooses tokens before the language model, from the vision tower."""
    select = action.get("select")
    if select is None:
        return False
    score = select["score"] if isinstance(select, Mapping) else select.score
    return row("score", score).needs == TOWER


def parameters(select: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a selection's score, with their defaults.

    Raises:
        ScheduleError: one that the score has not, or that cannot be.
    """
    score, found = select["score"], select.get("parameters") or {}
    if score in KEYS:
        return _read_part(score, found, f"parameters of {score}")
    if found:
        raise ScheduleError(f"score {score} has no parameters")
    return {}


def check_order(actions: Sequence[Mapping[str, Any]]) -> None:
    """Hold actions, each of which is right, against those above them.

    Raises:
        ScheduleError: one starts before the one above it, or behind a withdrawal.
    """
    last, withdrawn = 0, False
    for number, action in enumerate(actions, 1):
        name = f"action {number} ({action['action']})"
        if in_front(action) and any(a["action"] in ("withdraw", "keep") for a in actions[: number - 1]):
            raise ScheduleError(
                f"{name} chooses in front of layer 0, so it must be the first to take tokens away"
            )
        if withdrawn:
            raise ScheduleError(f"{name} comes after the withdrawal of all visual tokens")
        start = action.get("after") if action["at"] == "auto" else action["at"]
        if start is not None:
            if start < last:
                raise ScheduleError(f"{name} starts at {start}, before the one above it")
            last = start
        withdrawn = action["action"] == "withdraw"


def read(schedule: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The actions of a schedule in canonical form, with their defaults.

    Raises:
        ScheduleError: it is none, or a newer one than is known here.
    """
    version, actions = schedule.get("format_version"), schedule.get("actions", ())
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        known = " or ".join(map(str, range(1, FORMAT_VERSION + 1)))
        raise ScheduleError(f"schedule format {version!r} is not {known}; update the runtime")
    found = []
    for number, data in enumerate(actions, 1):
        name = data.get("action") if isinstance(data, Mapping) else data
        if name not in words("action"):
            known = ", ".join(words("action"))
            raise ScheduleError(f"action {number}: {name!r} is not executable; known: {known}")
        rest = {key: value for key, value in data.items() if key != "action"}
        found.append({"action": name, **_read_part(name, rest, f"action {number} ({name})")})
    check_order(found)
    check_version(version, found)
    return found


def check_version(version: int, actions: Iterable[Mapping[str, Any]]) -> None:
    """Hold the version that a schedule gives itself against what it says.

    Raises:
        ScheduleError: a word came later.
    """
    if version < (needed := version_of(actions)):
        raise ScheduleError(f"format_version is {version}, but what the schedule says needs {needed}")


def _read_part(part: str, data: Any, where: str) -> dict[str, Any]:
    """What the keys of an action, or those under one of them, hold; defaults where they are not there."""
    if not isinstance(data, Mapping):
        raise ScheduleError(f"{where}: must be a mapping of keys to values, not {data!r}")
    if unknown := sorted(set(data) - KEYS[part].keys()):
        raise ScheduleError(
            f"{where}: unknown key {unknown[0]!r}; this runtime may be older than the schedule"
        )
    found = {}
    for name, key in KEYS[part].items():
        value = data.get(name, key.default)
        if value is ...:
            raise ScheduleError(f"{where}: the key {name!r} is required")
        if name == "parameters" and value is not None:
            if not isinstance(value, Mapping):
                raise ScheduleError(
                    f"{where}: parameters must be a mapping of names to values, not {value!r}"
                )
        elif key.kind is dict and value is not None:
            value = _read_part(name, value, f"{where}, {name}")
        elif key.kind is str and words(name) and value not in words(name):
            raise ScheduleError(f"{where}: {name} {value!r} is not one of {', '.join(words(name))}")
        elif not (value is key.default or (key.auto and value == "auto") or _holds(key, value)):
            raise ScheduleError(f"{where}: {name} is {value!r}, which it cannot be")
        if value is not None:
            found[name] = value
    try:
        check_rules(part, found)
    except ScheduleError as error:
        raise ScheduleError(f"{where}: {error}") from None
    return found


def _holds(key: Key, value: Any) -> bool:
    """Whether a value is of the key's kind and within its bounds."""
    if key.kind is bool or isinstance(value, bool):
        return key.kind is bool and isinstance(value, bool)
    kinds = (int, float) if key.kind is float else (key.kind,)
    if type(value) not in kinds or (isinstance(value, float) and not math.isfinite(value)):
        return False
    return (key.least is None or value >= key.least) and (key.most is None or value <= key.most)


def earliest_starts(actions: Iterable[Mapping[str, Any]]) -> list[int]:
    """The first layer at which each ``withdraw`` and ``keep`` may start, in their order.

    A condition is first looked at behind ``after`` and once the action above has started, and what it starts begins
    one layer later.
    """
    start, found = 0, []
    for action in actions:
        if leaves(action):
            after = action.get("after")
            first = (
                max(-1 if after is None else after, start - 1) + 2 if action["at"] == "auto" else action["at"]
            )
            start = max(start, first)
            found.append(start)
    return found


def check_depth(actions: Sequence[Mapping[str, Any]], layers: int, first_withdrawal: int = 0) -> None:
    """Hold valid actions against a model.

    Args:
        layers: number of decoder layers L; a start at L means "never".
        first_withdrawal: the first layer at which the family's visual tokens may leave.

    Raises:
        ScheduleError: an action lies outside the model, or takes tokens before they all have come.
    """
    for number, action in enumerate(actions, 1):
        starts = earliest_starts(actions[:number])
        for name in ("at", "until", "after"):
            value = action.get(name)
            if isinstance(value, int) and value > layers:
                raise ScheduleError(
                    f"schedule action {number} ({action['action']}): {name} is {value}, "
                    f"but the model has {layers} layers (0..{layers - 1})"
                )
        if starts and starts[-1] < first_withdrawal and not in_front(action):
            raise ScheduleError(
                f"schedule action {number} ({action['action']}) starts at layer {starts[-1]}, but this family "
                f"still adds vision in layers 0..{first_withdrawal - 1}",
                f"start at {first_withdrawal} or later",
            )
