"""The words of a schedule: each once, with what it needs and says; and how many tokens they leave.

This file and ``rules`` need Python alone: exported directories carry copies of them.

A schedule is a plain dict, ``{"format_version": 1, "actions": [...]}``, with version 2 where a word or key occurs that
came later (``since``); its actions, by layer (0-based):

- ``{"at": K, "action": "withdraw"}``: from layer K on there are no visual tokens.
- ``{"at": K, "action": "keep", "select": {...}}``: from layer K on only the selected visual tokens exist. ``select``
  holds a ``score`` and one of ``ratio``, ``count``, ``share`` (a ratio of the tokens that the prompt brought, rounded
  down), ``above`` and ``found`` (as many as the score itself finds).

  - Scores are ``contribution`` and ``attention``, from layer K - 1; ``self_cross``, of all rows of layer K - 1;
    ``change``, the distance between a token's rows at the entries of layers K - 1 and K; ``duplication``, which puts
    those in front that are least like a few pivots (DART, arXiv 2502.11494; ``states.distinct``), and of which a share
    is rounded so that each pivot takes as many; ``random`` with a ``seed``; ``uniform``; ``guided`` by ``guide``.
  - Scores named ``tower_...`` come from the vision tower and go with K = 0 alone; they choose for each image on its
    own, so ``count`` and ``ratio`` are of an image's tokens, and ``parameters`` are theirs (``rules.KEYS`` under the
    score's name). What stays gets the positions of a shorter prompt, but where positions have axes for rows and
    columns of an image.
  - With ``layer: here`` attention is that of layer K itself, as its own norm, queries and keys see the rows that enter
    it, at the positions that they had until then.
  - ``rows`` are those whose attention is asked, in the mean: the ``last``, ``text`` behind the last visual token (the
    last row where there is none), ``raters`` among these, the ``visual`` ones that are left, or ``all`` that are.
    Raters are the rows of text whose share of the embedded image's dot products, in a softmax over the text and in the
    mean over the image, is above the mean.
  - Of its heads only those ``heads`` count whose weights from these rows to visual tokens sum up to most; with
    ``level: true`` weights are first divided by what rotary embedding makes of rows of ones at both positions.
  - With ``positions: compact`` rows behind tokens that left move up: from layer K on positions, those of answer tokens
    too, are lower by the number of visual tokens in front of them that are gone; otherwise all keep theirs.
  - With ``rest`` (``merge: cluster``) n tokens that are not kept leave rows behind: the int(``share`` n) + 1 = m of the
    highest score are merged, by DPC-kNN, into int(``into`` m) + 1 means, which stand behind the kept ones (SparseVLM,
    arXiv 2410.04417; ``merge.clusters``).
  - With ``every``: n it does nothing to the prompt: behind each n-th token that follows it, layers K and later forget
    all but the selected of the visual tokens that they hold; the score is that token's own, in layer K - 1.
- ``{"at": A, "until": B, "action": "mute"}``: in layers A..B-1 ``readers`` (``text``, ``visual`` or ``all`` rows) do
  not read visual columns (``columns``: ``all`` or the ``first_half`` of them; in format 2 for ``visual`` readers also
  ``beyond``: those of other images and those more than ``steps`` rows or columns away in the grid of their image, and
  with ``both_ways`` the nearer ones are read even where they come later); their attention mass is renormalised
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
some cos(o - c_i, o) < x, ``cosine_above``: x where all of them are >= x, ``attention_below``: x where the ``attention``
of all visual tokens that are still there sums to less than x (format 2); it must hold in ``layers`` layers,
``consecutive`` or in total (VisiPruner, arXiv 2510.17205; without ``consecutive`` as its code does). A sample
without visual tokens meets no condition. ``self_cross`` looks at all rows of the chunk: with m_ri the largest weight
of any head from row r to visual token i, it is the mean of m_ri over the visual rows times its sum over the text rows
(FitPrune, arXiv 2409.10197).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

FORMAT_VERSION: Final = 2
"""The newest that is known here; a schedule is written with the least that has its words, see ``version_of``."""


class ScheduleError(ValueError):
    """A schedule that nobody can execute: what is wrong (``message``) and what to do about it (``hint``)."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message if hint is None else f"{message}; {hint}")
        self.message, self.hint = message, hint


LAST_ROW, ALL_ROWS, HIDDEN, KEYED = "last row", "all rows", "hidden states", "keys"
TOWER, GUIDE = "vision tower", "a second model"
PIVOTS: Final = (4, 4)
"""Visual rows and rows of text that ``duplication`` is measured from."""
REST_SHARE: Final = 0.3
REST_INTO: Final = 0.1
_DYNAMIC = (
    "a dynamic schedule cannot be exported to ONNX: where and what is removed depends on the sample, and graphs are "
    "cut at fixed layers",
    "run it and put the layer that its trace shows into a static schedule, for example {at: 16, action: withdraw}; or "
    "export with --format hf",
)


@dataclass(frozen=True)
class Word:
    """A word and everything that is to be known of it.

    Attributes:
        slot: what it is said of.
        says: its part of a sentence; ``{}`` stands for a value, in scores of the tower names for their parameters.
        needs: what must be measured: nothing, attention (the ``last row``'s, or that of ``all rows``), ``hidden
            states``, the ``keys`` of the layer before too, the ``vision tower``, or ``a second model``.
        fixed: whether layer and number of tokens are known before a sample is seen.
        onnx: why graphs cannot have it, and what to do; None where they have it.
        since: the format version from which on there is such a word.
        finds: whether the number of tokens may be what the score itself finds.
    """

    slot: str
    word: str
    says: str = ""
    needs: str | None = None
    fixed: bool = True
    onnx: tuple[str, str] | None = None
    since: int = 1
    finds: bool = False


_NO_GRAPH = (
    "the action mute cannot be exported to ONNX",
    "use a schedule of withdraw, keep and freeze, or --format hf",
)
_LEFT = "there are no visual tokens: not in the hidden states, and not in the KV cache"
_FROZEN = "visual tokens are not updated; they still serve as keys and values"
_CHANGES = "some visual token changes the attention output (cosine below {:g})"
_STILL = "no visual token changes the attention output any more (cosine at least {:g})"
_UNREAD = "the last token pays visual tokens less than {:g} of its attention"
_CONTRIBUTION = "largest contribution to the last token's attention output"
_READ_BY_BOTH = "largest product of the attention from visual rows and from text rows"
_ROWS_ONNX = (
    "keep with self_cross scores cannot be exported to ONNX: graphs look at the last row's attention only",
    "use attention, or --format hf",
)
_ANSWER_ONNX = (
    "keep during the answer ('every') cannot be exported to ONNX: graphs of a step take no token away",
    "leave out the actions with every, or --format hf",
)
_IN_TOWER = (
    "keep with scores of the vision tower cannot be exported to ONNX: the graph of the encoder hands on features only",
    "use --format hf",
)


def _tower(word: str, says: str, finds: bool = False) -> Word:
    return Word("score", word, says, needs=TOWER, fixed=False, onnx=_IN_TOWER, since=2, finds=finds)


_STATES = (
    "scores of hidden states (change, duplication) cannot be exported to ONNX: graphs hand out attention only",
    "use attention or uniform, or --format hf",
)
_ASKERS = (
    "scores by other rows than the last cannot be exported to ONNX: graphs look at the last row only",
    "use rows: last, or --format hf",
)
_HERE = (
    "scores of the layer itself (layer: here) cannot be exported to ONNX: graphs are cut where tokens leave, and the "
    "scores would come from behind the cut",
    "use layer: before, or --format hf",
)
_COMPACT = (
    "positions: compact cannot be exported to ONNX: graphs take positions from the rows of the prompt",
    "use positions: original, or --format hf",
)
_SHARE = (
    "a share of the prompt's visual tokens cannot be exported to ONNX: graphs know how many are left",
    "use ratio or count, or --format hf",
)
_MERGED = (
    "merged tokens (rest: cluster) cannot be exported to ONNX: graphs take rows away and make none",
    "leave out rest, or use --format hf",
)
_GUIDED = (
    "a schedule with a guide cannot be exported: a second model chooses its tokens, and an export holds one model",
    "run it with vtw eval or vtw budget, or export another score",
)
_DRAWN = "keep with random scores cannot be exported to ONNX, they are drawn by torch", "use uniform"

WORDS = (
    Word("action", "withdraw", _LEFT),
    Word("action", "keep", "only {} remain"),
    Word("action", "mute", "{} {}; {}", onnx=_NO_GRAPH),
    Word("action", "freeze", _FROZEN),
    Word("at", "auto", "the layer after the one where {}", needs=LAST_ROW, fixed=False, onnx=_DYNAMIC),
    Word("condition", "cosine_below", _CHANGES, needs=LAST_ROW, fixed=False, onnx=_DYNAMIC),
    Word("condition", "cosine_above", _STILL, needs=LAST_ROW, fixed=False, onnx=_DYNAMIC),
    Word("condition", "attention_below", _UNREAD, needs=LAST_ROW, fixed=False, onnx=_DYNAMIC, since=2),
    Word("score", "contribution", _CONTRIBUTION, needs=LAST_ROW),
    Word("score", "attention", "most attention from {}", needs=LAST_ROW),
    Word("score", "self_cross", _READ_BY_BOTH, needs=ALL_ROWS, onnx=_ROWS_ONNX, since=2),
    Word("score", "change", "largest change by the layer before", needs=HIDDEN, onnx=_STATES, since=2),
    Word("score", "duplication", "least like a few pivots", needs=KEYED, onnx=_STATES, since=2),
    Word("score", "random", "drawn at random", onnx=_DRAWN),
    Word("score", "uniform", "evenly spaced"),
    Word("score", "guided", "most attention from {} while it answers", needs=GUIDE, onnx=_GUIDED, since=2),
    _tower(
        "tower_cls", "in each image, most attention from the class token in vision layers {first} to {last}"
    ),
    _tower("tower_received", "in each image, best {per} by attention received in vision layer {layer}"),
    _tower(
        "tower_visionzip",
        "in each image, the class token, what it attends to, and means of others, as VisionZip does",
    ),
    _tower(
        "tower_prumerge",
        "in each image, outliers of the class token's attention, others merged in, as PruMerge does",
        finds=True,
    ),
    _tower(
        "tower_prumerge_plus",
        "in each image, outliers and evenly spaced tokens, others merged in, as PruMerge+ does",
        finds=True,
    ),
    _tower("tower_divprune", "in each image, those farthest from each other, as DivPrune does"),
    _tower(
        "tower_cdpruner", "in each image, those unlike each other and like the question, as CDPruner does"
    ),
    _tower(
        "tower_vispruner",
        "in each image, most attention from the class token, and no twins, as VisPruner does",
    ),
    _tower(
        "tower_hiprune",
        "in each image, what receives attention in an early and a late vision layer, as HiPrune does",
    ),
    _tower(
        "tower_vscan",
        "in each image, most attention from the class token by windows and in all, as VScan does",
    ),
    _tower(
        "tower_holov", "in each image, most attention from the class token, by quotas of crops, as HoloV does"
    ),
    _tower(
        "tower_prunesid",
        "in each image, most attention from the class token, by groups of alike tokens, as PruneSID does",
    ),
    _tower(
        "tower_two_cuts",
        "in each image, those most like the class token, to the knee of the curve",
        finds=True,
    ),
    Word("per", "token", "tokens", since=2),
    Word("per", "row", "rows of tokens", since=2),
    Word("amount", "ratio", "{:.0%} of the visual tokens"),
    Word("amount", "count", "{} visual tokens"),
    Word("amount", "share", "{:.3g} of the prompt's visual tokens", onnx=_SHARE, since=2),
    Word("amount", "above", "the visual tokens above {:g}", fixed=False, onnx=_DYNAMIC),
    Word("amount", "found", "as many visual tokens as the rule finds", fixed=False, onnx=_DYNAMIC, since=2),
    Word("rows", "last", "the last token"),
    Word("rows", "text", "the text behind the image", onnx=_ASKERS, since=2),
    Word("rows", "raters", "the text that the image suits", onnx=_ASKERS, since=2),
    Word("rows", "visual", "visual tokens", onnx=_ASKERS, since=2),
    Word("rows", "all", "all tokens", onnx=_ASKERS, since=2),
    Word("heads", "heads", "in the {} heads that read the image most", onnx=_ASKERS, since=2),
    Word("level", "level", "levelled by distance", onnx=_ASKERS, since=2),
    Word("layer", "before", "in the layer before"),
    Word("layer", "here", "as the layer itself sees it", onnx=_HERE, since=2),
    Word("positions", "original", "rows keep their positions"),
    Word("positions", "compact", "rows behind those that left move up", onnx=_COMPACT, since=2),
    Word("merge", "cluster", "the best of the others are merged into clusters", onnx=_MERGED, since=2),
    Word("every", "every", "Every {} tokens of the answer, ", onnx=_ANSWER_ONNX, since=2),
    Word("sink", "renormalise", "the attention goes to the other tokens"),
    Word("sink", "first", "the attention goes to the first visual token"),
    Word("sink", "zero", "the attention is dropped"),
    Word("readers", "text", "text does not read"),
    Word("readers", "visual", "visual tokens do not read"),
    Word("readers", "all", "nothing reads"),
    Word("columns", "all", "visual tokens"),
    Word("columns", "first_half", "the first half of the visual tokens"),
    Word("columns", "beyond", "visual tokens more than {} steps away in their image's grid", since=2),
    Word("during", "all"),
    Word("during", "prefill", "while the prompt is read"),
)
"""Every word; the first of a slot is its default."""

MUTED = ("sink", "readers", "columns", "during")
"""The slots of ``mute``."""

SELECTED = ("rows", "layer")
"""The slots of ``select`` beside its score and amount."""

OF_ATTENTION = ("heads", "level")
"""Keys of ``select`` that go with the score ``attention``."""

_ROWS = {(row.slot, row.word): row for row in WORDS}


def words(slot: str) -> tuple[str, ...]:
    """The words of a slot, its default first."""
    return tuple(row.word for row in WORDS if row.slot == slot)


def row(slot: str, word: str) -> Word:
    """What is known of a word.

    Raises:
        KeyError: there is none such.
    """
    return _ROWS[slot, word]


def used(actions: Iterable[Mapping[str, Any]]) -> Iterator[Word]:
    """The words that valid actions say, in their order; defaults that are left unsaid are not among them."""
    for action in actions:
        yield row("action", action["action"])
        if action["at"] == "auto":
            yield row("at", "auto")
        select, when = action.get("select") or {}, action.get("when") or {}
        if select:
            yield row("score", select["score"])
            yield from (row(slot, select[slot]) for slot in SELECTED if slot in select)
            yield from (row(key, key) for key in OF_ATTENTION if select.get(key))
        yield from (row(slot, action[slot]) for slot in ("positions",) if slot in action)
        yield from (row("merge", action["rest"]["merge"]) for _ in ("rest",) if action.get("rest"))
        if action.get("every") is not None:
            yield row("every", "every")
        for slot, data in (("condition", when), ("amount", select)):
            yield from (row(slot, word) for word in given(slot, data))
        yield from (row(slot, action[slot]) for slot in MUTED if slot in action)


def given(slot: str, data: Mapping[str, Any]) -> list[str]:
    """The keys that are words of a slot and hold something."""
    return [word for word in words(slot) if data.get(word) is not None]


def leaves(action: Mapping[str, Any]) -> bool:
    """Whether an action takes tokens away from the prompt."""
    return action["action"] == "withdraw" or (action["action"] == "keep" and action.get("every") is None)


def version_of(actions: Iterable[Mapping[str, Any]]) -> int:
    """The least format version that has all words of valid actions."""
    return max((word.since for word in used(actions)), default=1)


def is_fixed(actions: Iterable[Mapping[str, Any]]) -> bool:
    """Whether the layer and number of tokens of every action are known before a sample is seen."""
    return all(word.fixed for word in used(actions))


def count_of(ratio: float, present: int) -> int:
    """How many of ``present`` tokens a ratio is: rounded up."""
    return math.ceil(ratio * present)


def kept_count(select: Mapping[str, Any], present: int, visual: int | None = None) -> int:
    """How many of ``present`` tokens a selection keeps, of a prompt that had ``visual`` ones (by default as many).

    Args:
        prompt: number of visual tokens of the prompt, those that left included; None: none has left.

    Raises:
        ScheduleError: a threshold, which keeps a number that depends on the sample.
    """
    if select.get("count") is not None:
        return min(int(select["count"]), present)
    if select.get("ratio") is not None:
        return count_of(select["ratio"], present)
    if select.get("share") is not None:
        # 300/576 of 576 are 300, whatever the last bit
        wanted = select["share"] * (present if visual is None else visual)
        if select["score"] == "duplication":
            wanted = PIVOTS[0] + sum(PIVOTS) * int(round(wanted / sum(PIVOTS), 9))
        return min(int(round(wanted, 9)), present)
    raise ScheduleError("a threshold keeps a number of tokens that depends on the sample")


def merged_count(action: Mapping[str, Any], dropped: int) -> tuple[int, int]:
    """How many of the ``dropped`` tokens of a ``keep`` are merged, and into how many."""
    rest = action.get("rest")
    if not rest or not dropped:
        return 0, 0
    merged = min(int(rest.get("share", REST_SHARE) * dropped) + 1, dropped)
    return merged, min(int(rest.get("into", REST_INTO) * merged) + 1, merged)


def visual_per_layer(actions: Sequence[Mapping[str, Any]], layers: int, visual: int) -> list[int]:
    """Number of visual tokens present in each layer for a sample that has ``visual`` of them.

    Raises:
        ScheduleError: the schedule is dynamic, so the numbers are known only after a run.
    """
    if not is_fixed(actions):
        raise ScheduleError("a dynamic schedule has no fixed token counts", "run it and read its trace")
    counts, present = [], visual
    for layer in range(layers):
        for action in actions:
            if action["at"] == layer and action["action"] == "withdraw":
                present = 0
            elif action["at"] == layer and leaves(action):
                kept = kept_count(action["select"], present, visual)
                present = kept + merged_count(action, present - kept)[1]
        counts.append(present)
    return counts


def frozen_layers(actions: Sequence[Mapping[str, Any]], layers: int) -> list[bool]:
    """Whether the visual tokens of each layer are not updated."""
    ranges = [range(a["at"], a["until"]) for a in actions if a["action"] == "freeze"]
    return [any(layer in frozen for frozen in ranges) for layer in range(layers)]
