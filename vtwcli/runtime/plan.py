"""A schedule, asked layer by layer.

A *schedule* is a plain dict, ``{"format_version": 1, "actions": [...]}``; its actions, by layer (0-based):

- ``{"at": K, "action": "withdraw"}``: from layer K on there are no visual tokens.
- ``{"at": K, "action": "keep", "select": {...}}``: from layer K on only the selected visual tokens exist. ``select``
  holds a ``score`` (``contribution``, ``attention``, ``random`` with ``seed``, ``uniform``) and one of ``ratio``,
  ``count`` and ``above``. The two measured scores come from layer K - 1.
- ``{"at": A, "until": B, "action": "mute"}``: in layers A..B-1 ``readers`` (``text``, ``visual`` or ``all`` rows) do
  not read visual columns (``columns``: ``all`` or the ``first_half`` of them); their attention mass is renormalised
  over the rest, moved onto the ``first`` visual token, or set to ``zero`` after the softmax (``sink``). Tokens behind
  the prompt are text rows too; with ``during`` ``prefill`` instead of ``all`` they read as usual. A row that
  ``renormalise`` leaves nothing to read reads itself.
- ``{"at": A, "until": B, "action": "freeze"}``: in layers A..B-1 visual rows are not updated; they still serve as
  keys and values.

``"at": "auto"`` starts ``withdraw`` or ``keep`` for each sample at its own layer: the condition ``when`` is looked at
in the layers *after* ``after`` (default: in all), once every action above it in the list has started; when it holds
in layer d, the action starts at layer d + 1. A later action with a fixed layer makes a waiting one void. Over the
last row of the prompt, with w_i the attention weight of visual token i and v_i its value in each head, c_i is the
concatenation over heads of w_i v_i, and o the sum of c over all columns: the attention's output before its output
projection. ``contribution`` is ||c_i||_2, ``attention`` the mean of w_i over heads, ``cosine_below``: x holds where
some cos(o - c_i, o) < x, ``cosine_above``: x where all of them are >= x; it must hold in ``layers`` layers,
``consecutive`` or in total (VisiPruner, arXiv 2510.17205; without ``consecutive`` as its code does). A sample
without visual tokens meets no condition.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from vtwcli.runtime.contract import PruningError


@dataclass(frozen=True)
class PlannedAction:
    """One action of the schedule; ``at`` is None for ``auto``. Field names are those of the canonical form."""

    action: str
    at: int | None
    until: int | None = None
    after: int = -1
    when: Mapping[str, Any] = field(default_factory=dict)
    select: Mapping[str, Any] = field(default_factory=dict)
    sink: str = "renormalise"
    readers: str = "text"
    columns: str = "all"
    during: str = "all"

    @property
    def measured(self) -> bool:
        """Whether the selection needs attention numbers of the layer before."""
        return self.select.get("score") in ("contribution", "attention")

    def covers(self, layer: int) -> bool:
        """Whether a range action acts in ``layer``."""
        return self.at is not None and self.until is not None and self.at <= layer < self.until


_KEYS = {
    "withdraw": {"after", "when"},
    "keep": {"after", "when", "select"},
    "mute": {"until", "sink", "readers", "columns", "during"},
    "freeze": {"until"},
}


_WHEN = {"cosine_below", "cosine_above", "layers", "consecutive"}


_WORDS = {
    "sink": ("renormalise", "first", "zero"),
    "readers": ("text", "visual", "all"),
    "columns": ("all", "first_half"),
    "during": ("all", "prefill"),
}


def _parse(number: int, data: Mapping[str, Any]) -> PlannedAction:
    """One action out of its canonical form; ``number`` is for messages."""
    name, rest = data.get("action"), {k: v for k, v in data.items() if k not in ("action", "at")}
    if name not in _KEYS:
        raise PruningError(f"action {number}: {name!r} is not executable; known: {', '.join(_KEYS)}")
    where = f"action {number} ({name})"
    if unknown := sorted(set(rest) - _KEYS[name]):
        raise PruningError(
            f"{where}: unknown key {unknown[0]!r}; this runtime may be older than the schedule"
        )
    at = data.get("at")
    if at == "auto" and name in ("withdraw", "keep"):
        when = set(rest.get("when") or ())
        if len(when & {"cosine_below", "cosine_above"}) != 1 or when - _WHEN:
            raise PruningError(f"{where}: 'when' must hold cosine_below or cosine_above, layers, consecutive")
        at = None
    elif not isinstance(at, int) or isinstance(at, bool) or at < 0:
        raise PruningError(f"{where}: 'at' must be a layer number, not {at!r}")
    elif "when" in rest or "after" in rest:
        raise PruningError(f"{where}: 'when' and 'after' go with 'at': 'auto'")
    if name in ("mute", "freeze") and not (isinstance(rest.get("until"), int) and rest["until"] > at):
        raise PruningError(f"{where}: 'until' must be a layer number above {at}")
    for key, words in _WORDS.items():
        if rest.get(key, words[0]) not in words:
            raise PruningError(f"{where}: {key} {rest[key]!r} is not one of {', '.join(words)}")
    if name == "keep":
        select = rest.get("select") or {}
        score, amounts = select.get("score"), [k for k in ("ratio", "count", "above") if k in select]
        if score not in ("contribution", "attention", "random", "uniform"):
            raise PruningError(f"{where}: score {score!r} is not executable")
        if len(amounts) != 1 or set(select) - {"score", "seed", *amounts}:
            raise PruningError(f"{where}: 'select' must hold score, one of ratio, count and above, and seed")
        if amounts == ["above"] and score in ("random", "uniform"):
            raise PruningError(f"{where}: score {score} has no threshold; give ratio or count")
        if at == 0 and score in ("contribution", "attention"):
            raise PruningError(f"{where}: score {score} comes from the layer before; start at 1 or later")
    if rest.get("after", 0) is None:
        rest.pop("after")
    return PlannedAction(action=name, at=at, **rest)


class Plan:
    """A validated schedule, asked layer by layer.

    Raises:
        PruningError: an action that this runtime cannot execute on a model of this depth.
    """

    def __init__(self, schedule: Mapping[str, Any], depth: int, first_withdrawal: int) -> None:
        if schedule.get("format_version") != 1:
            version = schedule.get("format_version")
            raise PruningError(f"schedule format {version!r} is not 1; update the runtime")
        actions = [_parse(i, data) for i, data in enumerate(schedule.get("actions", ()), 1)]
        self.depth = depth
        self.key = json.dumps(schedule.get("actions", ()), sort_keys=True)
        self.leaving = [a for a in actions if a.action in ("withdraw", "keep")]
        self.mutes = [a for a in actions if a.action == "mute"]
        self.freezes = [a for a in actions if a.action == "freeze"]
        start = 0
        for i, a in enumerate(self.leaving):
            if a.at is None:  # nothing is looked at before the action above has started
                self.leaving[i] = replace(a, after=max(a.after, start - 1))
            start = max(start, self.leaving[i].after + 2 if a.at is None else a.at)
            if start < min(first_withdrawal, depth):
                raise PruningError(
                    f"{a.action} may start at layer {start}, but this family adds vision in layers "
                    f"0..{first_withdrawal - 1}; start at {first_withdrawal} or later"
                )
        for layer in range(depth):
            if self.may_probe(layer) and any(a.covers(layer) and a.readers != "visual" for a in self.mutes):
                raise PruningError(
                    f"layer {layer} is muted, so it has no scores or conditions; let 'keep' start two layers "
                    "after the mute ends, and 'auto' look after it ('after': its 'until' or later)"
                )

    def may_probe(self, layer: int) -> bool:
        """Whether the last row's attention in ``layer`` may be asked for."""
        if layer + 1 >= self.depth:
            return False
        return any(
            (a.at == layer + 1 and a.measured) or (a.at is None and layer > a.after) for a in self.leaving
        )

    def sinks(self, layer: int, prefill: bool) -> list[PlannedAction]:
        """Mutes in ``layer`` that act on values, after the softmax."""
        return [a for a in self._mutes(layer, prefill) if a.sink != "renormalise"]

    def masks(self, layer: int, prefill: bool) -> list[PlannedAction]:
        """Mutes in ``layer`` that act before the softmax."""
        return [a for a in self._mutes(layer, prefill) if a.sink == "renormalise"]

    def _mutes(self, layer: int, prefill: bool) -> list[PlannedAction]:
        """Mutes in ``layer``, in a forward pass with visual tokens of its own (``prefill``) or behind it."""
        return [a for a in self.mutes if a.covers(layer) and (prefill or a.during == "all")]

    def mutes_in(self, layer: int) -> bool:
        """Whether anything is muted in ``layer``."""
        return any(a.covers(layer) for a in self.mutes)

    def text_skips(self, layer: int, prefill: bool) -> bool:
        """Whether text rows do not even need the visual columns of ``layer``."""
        return any(a.readers != "visual" and a.columns == "all" for a in self.masks(layer, prefill))

    def frozen(self, layer: int) -> bool:
        """Whether visual rows are not updated in ``layer``."""
        return any(a.covers(layer) for a in self.freezes)

    @property
    def idle(self) -> bool:
        """Whether nothing ever happens in a model of this depth."""
        return all(
            a.at is not None and a.at >= self.depth for a in [*self.leaving, *self.mutes, *self.freezes]
        )
