"""Runs a visual token schedule on a stock transformers model, by hooks.

This file is self-contained (torch and transformers only): an exported model directory carries a copy of it.

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

A *layout* tells where a family keeps its parts: ``text_model`` (path of the text model; its parent receives
``input_ids``), ``placeholder_ids`` (of visual tokens in ``input_ids``) and ``first_withdrawal`` (first layer at
which visual tokens may leave).

How it works. Visual tokens are the placeholders of a forward pass that also brings vision inputs. Where tokens leave,
hidden states, rotary embeddings and masks are gathered to the remaining rows, right-aligned; text keeps its
positions. The masks of the model itself are gathered too, so block-wise and sliding-window masks stay exact (a window
counts original positions). From there on the cache's layers are ``PrunedLayer``: they hold fewer entries and know
the original position of each, and report the number of tokens *seen*, so that everything around them (``generate``,
cropping, beams, a second turn) works unchanged. After the text model the rows are put back: logits keep their shape
[B, S, V], those of absent rows are the head applied to zeros. The last row of a prompt always runs, since it
predicts the next token; if it is a visual token, nobody reads it. ``output_hidden_states`` shows the remaining rows
only, fillers included, from the first layer at which some left.

What it saves. ``withdraw`` and ``keep`` save the rows and cache entries of the tokens that left. ``mute`` saves next
to nothing in prefill, where text's reading of vision is a small part; under ``renormalise`` decode steps do not
touch the muted entries. ``freeze`` saves nothing yet: the rows are computed and put back.

Limits. Flash attention gets two-dimensional masks; that path was tested with plain stand-ins for its kernels, not on
a GPU. Under gradient checkpointing, actions that look inside attention are refused. When ``generate`` runs with
``use_cache=False`` every step is a prompt of its own, so measured scores come from the newest token's row; with
chunked prefill, from the last row of the chunk. Each prompt on a live cache decides for its own visual tokens.
"""

from __future__ import annotations

import copy
import inspect
import json
import math
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import transformers
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

Tensor = torch.Tensor

TESTED = ("4.57.6", "5.0.0", "5.10.4", "5.20.0", "5.23.0", "5.24.0")
"""Releases of transformers that this file was tested with."""

_CACHE_NAMES = ("cache", "past_key_values", "past_key_value")  # newest first
_POSITIONS = "position_embeddings"  # what the names of rotary embeddings begin with
# what layers are given that has, or may have, a row for each token, and is understood or does not matter
_PER_TOKEN = ("hidden_states", "position_ids", "attention_mask", "cache_position", *_CACHE_NAMES)

_CALL = "pruning_call"  # carries the state of one forward pass from the text model to its layers
_VISION_INPUTS = (
    "pixel_values",
    "high_res_pixel_values",
    "image_patches",
    "image_hidden_states",
    "image_features",
    "image_embeds",
    "video_embeds",
    "mm_encoder_outputs",
)
# kinds of tokens; other visual tokens than those of the first half of a prompt's are 1
_TEXT, _FIRST_HALF = 0, 2


class PruningError(ValueError):
    """The schedule cannot be executed exactly here; the message says why and what to do."""


def _strange(what: str) -> PruningError:
    """The model does not keep the contract that the hooks rely on; ``what`` says in which point."""
    return PruningError(
        f"{what}; its layers are not built like those that this runtime knows. transformers is "
        f"{transformers.__version__}: take a release it was tested with ({', '.join(TESTED)}), or run the model "
        "unpruned"
    )


# ---------------------------------------------------------------------------------------------- the schedule


@dataclass(frozen=True)
class _Action:
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


def _parse(number: int, data: Mapping[str, Any]) -> _Action:
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
    return _Action(action=name, at=at, **rest)


class _Plan:
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

    def sinks(self, layer: int, prefill: bool) -> list[_Action]:
        """Mutes in ``layer`` that act on values, after the softmax."""
        return [a for a in self._mutes(layer, prefill) if a.sink != "renormalise"]

    def masks(self, layer: int, prefill: bool) -> list[_Action]:
        """Mutes in ``layer`` that act before the softmax."""
        return [a for a in self._mutes(layer, prefill) if a.sink == "renormalise"]

    def _mutes(self, layer: int, prefill: bool) -> list[_Action]:
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


# ---------------------------------------------------------------------------------------------- the cache


@dataclass(eq=False)
class _Columns:
    """What the entries of a cache layer are; shared by layers, never changed in place.

    Attributes:
        position: index of each entry in the whole sequence (padding included), -1 where nobody may read, [B, T].
        kind: text or visual, [B, T] int8.
        ragged: whether some position is -1.
        visual: whether some kind may be visual.
    """

    position: Tensor
    kind: Tensor
    ragged: bool = False
    visual: bool = False
    picked: tuple[Any, _Columns] | None = None

    def pick(self, rows: Tensor) -> _Columns:
        """These rows of the batch; the layers of a cache all ask for the same ones in turn."""
        if self.picked is None or self.picked[0] is not rows:
            index = rows.to(self.position.device)
            taken = replace(self, position=self.position[index], kind=self.kind[index], picked=None)
            self.picked = (rows, taken)
        return self.picked[1]

    def slice(self, columns: slice | Tensor) -> _Columns:
        """These entries."""
        position = self.position[:, columns]
        return replace(self, position=position, kind=self.kind[:, columns], picked=None)

    def gather(self, rows: _Rows) -> _Columns:
        """The entries ``rows`` [B, T'], in each row of the batch its own."""
        assert rows.index is not None
        position = self.position.gather(1, rows.index).masked_fill(~rows.key, -1)
        return _Columns(position, self.kind.gather(1, rows.index), rows.ragged, self.visual)


class PrunedLayer(DynamicLayer):
    """A cache layer without some of the tokens it has seen.

    ``keys`` and ``values`` [B, H_kv, T, D] hold the remaining entries. ``get_seq_length`` is the number of tokens
    seen, as in the library's sliding layers, so masks and positions around it are those of the unpruned model.
    Entries that text rows never read may lie ``aside``, in a layer of their own.

    Args:
        layer: the stock layer it takes over from.
        batch: number of rows B.
        device: of the keys.
    """

    def __init__(self, layer: DynamicLayer, batch: int, device: torch.device) -> None:
        super().__init__()
        self.window = layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else None
        self.is_sliding = self.window is not None
        self.record_past = getattr(layer, "record_past", False)
        self.seen = layer.get_seq_length()
        self.aside: PrunedLayer | None = None
        self._coming: tuple[_Columns, int] | None = None
        held = 0
        if layer.keys is not None and layer.values is not None and layer.keys.numel():
            self.keys, self.values, held = layer.keys, layer.values, layer.keys.shape[-2]
            self.dtype, self.device, self.is_initialized = layer.keys.dtype, layer.keys.device, True
        position = torch.arange(self.seen - held, self.seen, device=device).expand(batch, held)
        self.columns = _Columns(position, torch.zeros(batch, held, dtype=torch.int8, device=device))

    def expect(self, columns: _Columns, tokens: int) -> None:
        """Announce what the next ``update`` leaves in the layer, and how many more tokens have then been seen."""
        self._coming = (columns, tokens)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append entries; returns all of them, as the library's layers do."""
        if self._coming is None:
            raise PruningError(
                "this cache was filled under a schedule; continue it under the same schedule, or start a new one"
            )
        (self.columns, tokens), self._coming = self._coming, None
        self.seen += tokens
        keys, values = super().update(key_states, value_states)
        for entries in (keys, values):
            if entries.ndim != 4 or (entries.shape[0], entries.shape[2]) != tuple(
                self.columns.position.shape
            ):
                raise _strange(
                    f"a layer's cache holds {list(entries.shape)}, where the schedule has "
                    f"{self.columns.position.shape[1]} entries a row"
                )
        if self.window is not None and not self.record_past and keys.shape[-2] >= self.window:
            # a later query at position p reads positions above p - window only
            alive = (self.columns.position > self.seen - self.window).any(0)
            first = int(alive.int().argmax()) if bool(alive.any()) else keys.shape[-2] - 1
            if first:
                self.keys, self.values = keys[:, :, first:], values[:, :, first:]
                self.columns = self.columns.slice(slice(first, None))
        return keys, values

    def set_aside(self, memo: dict[Any, Any]) -> None:
        """Move the visual entries aside; ``memo`` shares the work between layers."""
        if not self.columns.visual:
            return
        key = ("aside", id(self.columns))
        if key not in memo:
            there, visual = self.columns.position >= 0, self.columns.kind != _TEXT
            parts = _compact(there & ~visual), _compact(there & visual)
            text, visual_columns = (self.columns.gather(part) for part in parts)
            memo[key] = (*parts, replace(text, visual=False), visual_columns, self.columns)
        rows, others, columns, other_columns, _ = memo[key]
        self.aside = copy.copy(self)
        self.aside._hold(others, other_columns)
        self._hold(rows, columns)

    def recall(self) -> None:
        """Take back what was set aside; the order of entries does not matter, their positions tell it."""
        aside, self.aside = self.aside, None
        if aside is None:
            return
        assert aside.keys is not None and aside.values is not None
        assert self.keys is not None and self.values is not None
        self.keys = torch.cat([aside.keys, self.keys], 2)
        self.values = torch.cat([aside.values, self.values], 2)
        one, two = aside.columns, self.columns
        self.columns = _Columns(
            torch.cat([one.position, two.position], 1),
            torch.cat([one.kind, two.kind], 1),
            one.ragged or two.ragged,
            one.visual or two.visual,
        )

    def _hold(self, rows: _Rows, columns: _Columns) -> None:
        assert self.keys is not None and self.values is not None
        self.keys, self.values = _take(self.keys, rows.index, 2), _take(self.values, rows.index, 2)
        self.columns = columns

    def activate_past_recording(self) -> None:
        """Keep entries that left the sliding window, so that the layer can be cropped."""
        self.record_past = True

    def get_seq_length(self) -> int:
        """Number of tokens seen, not of entries held."""
        return self.seen

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """Length and offset of the masks the model makes: those of all tokens seen, or of a window's, since layers of
        one kind share a mask and others may be the library's. Releases before 5.10 give the positions of the queries
        in place of their number."""
        queries = query_length.shape[0] if isinstance(query_length, torch.Tensor) else query_length
        seen = self.seen if self.window is None else min(self.seen, self.window - 1)
        return seen + queries, self.seen - seen

    @property
    def awaited(self) -> bool:
        """Whether an announced ``update`` has not come."""
        return self._coming is not None

    def reset(self) -> None:
        """Forget everything."""
        self.keys = self.values = None
        self.is_initialized = False
        self.seen, self.aside, self._coming = 0, None, None
        self.columns = self.columns.slice(slice(0, 0))

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens seen."""
        if tokens_to_remove > 0:
            if "max_length" not in inspect.signature(DynamicLayer.crop).parameters:
                raise ValueError("give the number of tokens to remove as a negative number")
            tokens_to_remove = min(
                tokens_to_remove - self.seen, 0
            )  # releases before 5.20 say what is to stay
        if tokens_to_remove == 0 or self.keys is None or self.values is None:
            return
        if self.window is not None and not self.record_past and self.seen >= self.window:
            raise RuntimeError("a sliding layer that dropped old entries cannot be cropped")
        self.recall()
        self.seen += tokens_to_remove
        position = self.columns.position.masked_fill(self.columns.position >= self.seen, -1)
        stay = (position >= 0).any(0).nonzero()[:, 0]
        columns = replace(self.columns, position=position).slice(stay)
        self.columns = replace(columns, ragged=bool((columns.position < 0).any()))
        stay = stay.to(self.keys.device)
        self.keys, self.values = self.keys.index_select(2, stay), self.values.index_select(2, stay)

    def reorder_cache(self, beam_idx: Any) -> None:
        """Take these rows of the batch."""
        super().reorder_cache(beam_idx)
        self.columns = self.columns.pick(beam_idx)
        if self.aside is not None:
            self.aside.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch."""
        self.reorder_cache(torch.arange(self.columns.position.shape[0]).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Take these rows of the batch."""
        rows = torch.arange(self.columns.position.shape[0], device=indices.device)[indices]
        self.reorder_cache(rows)


def _cache_layer(cache: Any, index: int) -> DynamicLayer:
    """The layer of a dynamic cache, created if need be."""
    layers = getattr(cache, "layers", None)
    if layers is None:
        raise PruningError(f"{type(cache).__name__} is not supported under a schedule; use a DynamicCache")
    if getattr(cache, "layer_class_to_replicate", None) is not None:
        while len(layers) <= index:
            layers.append(cache.layer_class_to_replicate())
    layer = layers[index]
    if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer, PrunedLayer):
        raise PruningError(
            f"a cache with {type(layer).__name__} is not supported under a schedule; use a DynamicCache "
            "(leave cache_implementation unset)"
        )
    return layer


@dataclass(eq=False)
class _Tap:
    """Stands where the cache stands in one layer's call: keeps keys and values, may hand out other values.

    Attributes:
        cache: the model's, or None.
        call, layer, rows, columns, past: of the forward pass and the layer; ``columns`` None: those of a stock layer.
        base: mutes whose values the attention itself is given.
        second: mutes whose values text rows are given in a pass of their own, or None.
        skips: whether text rows are given text entries only, in a pass of their own.
        given: the mask that the model made.
        probes: whether the last row is to be looked at.
        due: whether the attention's hook still has something to do.
    """

    cache: Any
    call: _Call
    layer: int
    rows: _Rows
    columns: _Columns | None
    past: int
    base: list[_Action]
    second: list[_Action] | None
    skips: bool
    given: Tensor | None
    probes: bool
    due: bool
    keys: Tensor | None = None
    values: Tensor | None = None

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As a cache's."""
        if self.cache is not None:
            keys, values = self.cache.update(keys, values, *args, **kwargs)
        self.keys, self.values = keys, values
        return keys, values if self.columns is None else _sunk(values, self.columns, self.base)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["cache"], name)


class _Fixed:
    """A cache of one layer whose entries are all there already."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.entries = (keys, values)
        self.asked = 0

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As a cache's; the new entries are among the old ones."""
        self.asked += 1
        return self.entries


# ---------------------------------------------------------------------------------------------- one forward pass


@dataclass(eq=False)
class _Rows:
    """Which of a chunk's tokens have a row in the hidden states.

    Attributes:
        index: token of each row, [B, T]; right-aligned. None: all tokens, in place.
        query: the row is a token's, not a filler, [B, T].
        key: others may read the row, [B, T].
        ragged: whether some row is a filler or may not be read.
        lonely: whether some token has a row that others may not read.
    """

    index: Tensor | None
    query: Tensor
    key: Tensor
    ragged: bool = False
    lonely: bool = False


def _compact(stay: Tensor, readable: Tensor | None = None) -> _Rows:
    """Rows for the tokens that ``stay`` [B, S]; T is the largest number of them in any batch row, at least 1."""
    length = max(int(stay.sum(1).max()), 1)
    index = stay.int().argsort(dim=1, stable=True)[:, -length:]
    query = stay.gather(1, index)
    key = query if readable is None else (stay & readable).gather(1, index)
    ragged = not bool(key.all())
    return _Rows(index, query, key, ragged, ragged and key is not query and bool((query & ~key).any()))


def _take(x: Tensor, index: Tensor | None, dim: int, batch: int = 0) -> Tensor:
    """Gather ``index`` [B, T] along ``dim`` of ``x``, whose dimension ``batch`` has size B or 1; None: all."""
    if index is None:
        return x
    sizes, shape = list(x.shape), [1] * x.ndim
    sizes[batch], shape[batch], shape[dim] = index.shape[0], *index.shape
    x, sizes[dim] = x.expand(sizes), index.shape[1]
    return x.gather(dim, index.to(x.device).view(shape).expand(sizes))


def _take_positions(given: dict[str, Any], index: Tensor, length: int, attention: Any) -> None:
    """Gather all that tells rows their positions, in the arguments ``given`` for ``length`` rows."""
    names = [name for name, value in given.items() if name.startswith(_POSITIONS) and value is not None]
    if not names:
        raise _strange(f"the layers get no {_POSITIONS}")
    for name in names:
        given[name] = _take_position(name, given[name], index, length)
    ids = given.get("position_ids")
    if ids is not None:
        if ids.ndim < 2 or ids.shape[-1] != length or ids.shape[-2] not in (1, index.shape[0]):
            raise _strange(f"the layers get position_ids of shape {list(ids.shape)} for {length} rows")
        # flash attention would take a gap for the border between packed sequences, so it gets none
        taken = None if "flash" in _kind(attention) else _take(ids, index, ids.ndim - 1, ids.ndim - 2)
        given["position_ids"] = taken


def _take_position(name: str, x: Any, index: Tensor, length: int) -> Any:
    """Gather rows of rotary embeddings [B or 1, S, D], with an axis for time, row and column [3, B or 1, S, D] before
    them where these are merged later, or tuples of them."""
    if isinstance(x, tuple | list):
        return tuple(_take_position(name, part, index, length) for part in x)
    fits = isinstance(x, torch.Tensor) and x.ndim in (3, 4) and x.shape[-2] == length
    if not fits or x.shape[-3] not in (1, index.shape[0]):
        shape = list(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__
        raise _strange(f"the layers get {name} of {shape}, not [B, S, D] with {length} rows")
    return _take(x, index, x.ndim - 2, x.ndim - 3)


class _Call:
    """The state of one forward pass: a prompt, a chunk of one, or a decode step.

    Token indices count from the start of the chunk. Decisions are remembered per layer, so a layer that is run
    again by gradient checkpointing finds what it found before.
    """

    def __init__(
        self, plan: _Plan, visual: Tensor | None, real: Tensor | None, shape: tuple[int, int]
    ) -> None:
        """
        Args:
            visual: which tokens are visual, [B, S]; None if none is.
            real: which tokens are not padding, [B, S]; None if all are.
            shape: (B, S).
        """
        self.plan, self.visual, self.real, self.shape = plan, visual, real, shape
        self.memo: dict[Any, Any] = {}
        self.at: dict[int, _Rows] = {}
        self.present_at: list[Tensor] = []
        self.rows_at: list[int] = []
        self.fired: list[Tensor] = []
        self.kept: dict[int, Tensor] = {}
        self.probe: dict[str, Tensor] | None = None
        self.tap: _Tap | None = None
        self.past = 0
        self.cache: Any = None
        self.entered = 0  # how many layers have been
        self.over = False
        if visual is None:
            return
        device = visual.device
        batch, length = shape
        real = torch.ones_like(visual) if real is None else real
        visual = visual & real
        self.visual = visual
        place = torch.arange(length, device=device)
        # argmax of a row without any token would be 0; its last slot is as good
        last = (real * (place + 1)).argmax(1)
        self.last = torch.where(real.any(1), last, torch.full_like(last, length - 1))
        self.ordinal = visual.cumsum(1) - 1
        self.number = visual.sum(1)
        half = visual & (self.ordinal < (self.number // 2)[:, None])
        self.kind = visual.to(torch.int8) + half.to(torch.int8)
        self.real = real
        self.present = real.clone()
        self.is_last = real & (place[None] == self.last[:, None])
        self.stage = torch.zeros(batch, dtype=torch.long, device=device)
        self.count = torch.zeros_like(self.stage)
        self.fired = [torch.full_like(self.stage, -1) for _ in plan.leaving]

    # ------------------------------------------------------------------ who is there

    def full(self, device: torch.device) -> _Rows:
        """All tokens, in place; padding is nobody's row."""
        if "full" not in self.memo:
            here = torch.ones(self.shape, dtype=torch.bool, device=device) if self.real is None else self.real
            self.memo["full"] = _Rows(None, here, here, ragged=not bool(here.all()))
        return self.memo["full"]

    def rows(self, layer: int, device: torch.device) -> _Rows:
        """The rows that run in ``layer``."""
        if layer not in self.at:
            self._check_tap()
            before = self.at.get(layer - 1, self.full(device))
            self.at[layer] = before if self.visual is None else self._decide(layer, before)
            self.probe = None
            if self.visual is not None:
                self.present_at.append(self.present & self.visual)
                now = self.at[layer]
                self.rows_at.append(self.shape[1] if now.index is None else now.index.shape[1])
        return self.at[layer]

    def finish(self) -> _Rows | None:
        """After the last layer: the rows that ran in it.

        Raises:
            PruningError: a layer or its attention was passed by, or a cache does not hold what the schedule says.
        """
        self._check_tap()
        if self.entered != self.plan.depth:
            raise _strange(f"the model called {self.entered} of its {self.plan.depth} layers")
        self._check_cache()
        self.tap, self.cache, self.over = None, None, True
        self.memo.clear()
        return self.at.get(self.plan.depth - 1)

    def enter(self, layer: int, hidden: Any) -> None:
        """A layer begins: the ones before it must have run, and handed on the rows that they were given."""
        if self.over:
            return  # run again, by gradient checkpointing
        if layer != self.entered:
            raise _strange(f"layer {layer} runs where layer {self.entered} was to run")
        self.entered += 1
        self.check_rows(layer - 1, hidden)

    def check_rows(self, layer: int, hidden: Any) -> None:
        """``hidden`` must have the rows that ran in ``layer``; -1: those of the whole chunk."""
        rows = self.at.get(layer)
        wide = self.shape[1] if rows is None or rows.index is None else rows.index.shape[1]
        if not isinstance(hidden, torch.Tensor) or hidden.ndim != 3:
            shape: Any = type(hidden).__name__
        elif tuple(hidden.shape[:2]) != (self.shape[0], wide):
            shape = list(hidden.shape)
        else:
            return
        raise _strange(f"the rows behind layer {layer} are {shape}, not [{self.shape[0]}, {wide}, D]")

    def _check_tap(self) -> None:
        if self.tap is not None and (self.tap.due or self.tap.keys is None):
            raise _strange(f"layer {self.tap.layer} does not call its self_attn with the cache it is given")

    def _check_cache(self) -> None:
        """Every layer's cache has seen the chunk's tokens and holds the entries announced to it, no others."""
        seen = self.past + self.shape[1]
        for number, layer in enumerate(getattr(self.cache, "layers", None) or ()):
            if number >= self.plan.depth:
                break
            if getattr(layer, "awaited", False) or layer.get_seq_length() != seen:
                raise _strange(
                    f"layer {number} did not put its keys and values into the cache it was given: that has seen "
                    f"{layer.get_seq_length()} of {seen} tokens"
                )

    def probes(self, layer: int) -> bool:
        """Whether the last row's attention in ``layer`` decides something."""
        if not self.plan.may_probe(layer):
            return False
        return any(
            (a.at == layer + 1 and a.measured)
            or (a.at is None and layer > a.after and bool((self.stage == number).any()))
            for number, a in enumerate(self.plan.leaving)
        )

    def kinds(self, rows: _Rows, device: torch.device) -> Tensor:
        """Kinds of the rows' tokens, [B, T]."""
        index = self.index(rows, device)
        if self.visual is None:
            return torch.zeros_like(index, dtype=torch.int8)
        return self.kind.to(device).gather(1, index)

    def _decide(self, layer: int, before: _Rows) -> _Rows:
        """Let start what starts in ``layer``: ``stage`` counts the actions each sample has behind it."""
        assert self.visual is not None
        stage, left = self.stage, False
        for number, action in enumerate(self.plan.leaving):
            if action.at is None:
                if self.probe is None or layer - 1 <= action.after:
                    continue
                starts = self._condition(action, stage == number)
            elif action.at == layer:
                starts = self.stage <= number
            else:
                continue
            if action.at is None and not bool(starts.any()):
                continue
            stays = self.present & ~self.visual
            if action.action == "keep":
                chosen = self._select(action)
                stays = stays | chosen
                before_now = self.kept.get(number, torch.zeros_like(chosen))
                self.kept[number] = torch.where(starts[:, None], chosen, before_now)
            self.present = torch.where(starts[:, None], stays, self.present)
            self.stage = torch.where(starts, number + 1, self.stage)
            self.count = self.count.masked_fill(starts, 0)
            self.fired[number] = self.fired[number].masked_fill(starts, layer)
            left = True
        return _compact(self.present | self.is_last, self.present) if left else before

    def _condition(self, action: _Action, awaited: Tensor) -> Tensor:
        """Rows [B] at which an ``auto`` action starts, given the layer before."""
        assert self.probe is not None and self.visual is not None
        there, cosine = self.present & self.visual, self.probe["cosine"]
        if "cosine_below" in action.when:
            holds = ((cosine < action.when["cosine_below"]) & there).any(1)
        else:
            holds = ((cosine >= action.when["cosine_above"]) | ~there).all(1) & there.any(1)
        without = torch.zeros_like(self.count) if action.when.get("consecutive") else self.count
        self.count = torch.where(awaited, torch.where(holds, self.count + 1, without), self.count)
        return awaited & (self.count >= action.when.get("layers", 1))

    def _select(self, action: _Action) -> Tensor:
        """The visual tokens [B, S] that ``keep`` keeps among those present."""
        assert self.visual is not None
        there, select = self.present & self.visual, action.select
        number = there.sum(1)
        if select.get("above") is not None:
            return there & (self._measured(select["score"]) > select["above"])
        amounts = [
            min(n, select["count"]) if "count" in select else math.ceil(n * select["ratio"])
            for n in number.tolist()
        ]
        wanted = torch.tensor(amounts, device=number.device)
        if select["score"] == "uniform":
            # of n tokens the ceil(i n / m)-th for i = 0..m-1: those with (j m) mod n < m
            ordinal = there.cumsum(1) - 1
            return there & ((ordinal * wanted[:, None]) % number.clamp(min=1)[:, None] < wanted[:, None])
        if select["score"] == "random":
            score = self._random(select.get("seed", 0))
        else:
            score = self._measured(select["score"])
        score = score.masked_fill(~there, -torch.inf)
        order = score.argsort(dim=1, descending=True, stable=True)
        rank = order.argsort(dim=1)
        return there & (rank < wanted[:, None])

    def _measured(self, name: str) -> Tensor:
        """A score [B, S] that the layer before gave."""
        if self.probe is None:
            raise _strange(f"the attention of this model gave no {name}")
        return self.probe[name]

    def _random(self, seed: int) -> Tensor:
        """Scores [B, S] that depend on the seed and the number of a sample's visual tokens only."""
        assert self.visual is not None
        score = torch.zeros(self.shape, device=self.visual.device)
        for row, number in enumerate(self.number.tolist()):
            draw = torch.rand(number, generator=torch.Generator().manual_seed(seed))
            score[row, self.visual[row]] = draw.to(score.device)
        return score

    # ------------------------------------------------------------------ what a layer is given

    def slots(self, before: _Rows, now: _Rows) -> Tensor | None:
        """Where the rows of ``now`` lie among those of ``before``, [B, T]."""
        if before.index is None or now.index is None:
            return now.index
        place = torch.zeros(self.shape, dtype=torch.long, device=now.index.device)
        arange = torch.arange(before.index.shape[1], device=now.index.device).expand_as(before.index)
        place.scatter_(1, before.index, arange)
        return place.gather(1, now.index)

    def columns(self, old: _Columns | None, rows: _Rows, past: int, device: torch.device) -> _Columns:
        """The entries of a cache layer once ``rows`` are added to the ``old`` ones."""
        key = ("columns", id(old), id(rows), past)
        if key not in self.memo:
            index = self.index(rows, device)
            position = (index + past).masked_fill(~rows.key.to(device), -1)
            kind = self.kinds(rows, device)
            ragged, visual = rows.ragged, self.visual is not None
            if old is not None and old.position.shape[1]:
                position = torch.cat([old.position, position], 1)
                kind = torch.cat([old.kind, kind], 1)
                ragged, visual = ragged or old.ragged, visual or old.visual
            # the memo holds what its keys are the ids of, so that no other object gets them
            self.memo[key] = _Columns(position, kind, ragged, visual), old, rows
        return self.memo[key][0]

    def mask(
        self,
        given: Tensor | None,
        rows: _Rows,
        columns: _Columns,
        past: int,
        muted: list[_Action],
        hidden: Tensor,
        attention: Any,
    ) -> Tensor | None:
        """The mask for ``rows`` reading ``columns``, out of the one the model made for the whole chunk.

        Raises:
            PruningError: a mask of a form that is not known.

        Args:
            given: additive or boolean [B or 1, 1 or H, S, W], over the last W tokens seen; None: causal.
            past: tokens seen before the chunk.
            muted: actions that act before the softmax.
            hidden: hidden states, of the device and dtype wanted.
            attention: the module that gets it.
        """
        kind = _kind(attention)
        key = ("mask", id(given), id(rows), id(columns), tuple(map(id, muted)), kind)
        if key not in self.memo:
            self._check_mask(given, past, attention)
            if "flash" in kind:
                window = getattr(attention, "sliding_window", None)
                mask = _flash_mask(given, rows, columns, past + self.shape[1], muted, window)
            else:
                dtype = given.dtype if given is not None else hidden.dtype if kind == "eager" else torch.bool
                mask = self._mask(given, rows, columns, past, muted, hidden.new_empty(0, dtype=dtype))
            self.memo[key] = mask, given, rows, columns
        return self.memo[key][0]

    def _check_mask(self, given: Any, past: int, attention: Any) -> None:
        """Refuse a mask of the model whose form is not known: it must say who may read whom as ``mask`` expects."""
        if given is None:
            if not getattr(attention, "is_causal", True):
                raise _strange("the layers get no attention_mask, but do not read causally")
            return
        if not isinstance(given, torch.Tensor):
            raise _strange(f"the layers get an attention_mask of the kind {type(given).__name__}")
        shape, (batch, length), total = list(given.shape), self.shape, past + self.shape[1]
        if given.ndim == 2 and "flash" in _kind(attention) and shape[0] == batch and shape[1] <= total:
            return
        windows = (
            getattr(x, "sliding_window", None) for x in (attention, getattr(attention, "config", None))
        )
        window = next((w for w in windows if isinstance(w, int)), None)
        widths = (total, min(total, window - 1 + length)) if window else (total,)
        static = given.ndim == 4 and shape[-1] > total
        if given.ndim != 4 or shape[0] not in (1, batch) or shape[2] != length or shape[3] not in widths:
            raise PruningError(
                f"a mask of shape {shape} for {length} tokens behind {past} is not supported under a schedule; "
                + ("give no static cache" if static else "give [B, S], or [B, 1, S, T] of all T tokens")
            )
        if given.dtype != torch.bool and not given.is_floating_point():
            raise _strange(f"the layers get an attention_mask of {given.dtype}, neither boolean nor additive")
        if self.visual is None:
            return
        # what each token reads of its own chunk
        chunk = given[..., -length:] if shape[3] >= length else given
        read = chunk if chunk.dtype == torch.bool else chunk > torch.finfo(chunk.dtype).min
        assert self.real is not None
        real = self.real.to(given.device)
        read = read & real[:, None, :, None] & real[:, None, None, :]
        itself = read.diagonal(dim1=2, dim2=3)
        backward, forward = read.tril(-1).sum((2, 3)), read.triu(1).sum((2, 3))
        positive = chunk.is_floating_point() and bool((chunk > 0).any())
        if positive or not bool((itself | ~real[:, None]).all() & (backward >= forward).all()):
            raise _strange("the layers get an attention_mask that does not mask causally")

    def _mask(
        self,
        given: Tensor | None,
        rows: _Rows,
        columns: _Columns,
        past: int,
        muted: list[_Action],
        like: Tensor,
    ) -> Tensor | None:
        device = like.device
        tall, wide = rows.query.shape[1], columns.position.shape[1]
        plain = given is None and not (columns.ragged or rows.ragged or muted or like.is_floating_point())
        if plain and tall in (1, wide):
            return None  # causal, as the model meant it
        batch, length = self.shape
        position, index = columns.position.to(device), self.index(rows, device)
        query = rows.query.to(device)[:, None, :, None]
        bias: Tensor | None = None
        allowed = (position >= 0)[:, None, None, :].expand(batch, 1, tall, wide)
        if muted:
            kinds = self.kinds(rows, device), columns.kind.to(device)
            allowed = allowed & ~_muted_pairs(muted, *kinds)[:, None]
        if given is None:
            allowed = allowed & (position[:, None, None, :] <= (index + past)[:, None, :, None])
        else:
            first = past + length - given.shape[-1]  # sliding layers mask their last columns only
            place = position - first
            every = torch.arange(batch, device=device)[:, None, None]
            source = given.to(device).expand(batch, *given.shape[1:])
            taken = source[every, :, index[:, :, None], place.clamp(min=0)[:, None, :]].permute(0, 3, 1, 2)
            if taken.is_floating_point():
                read = taken > torch.finfo(taken.dtype).min
                bias = taken.masked_fill(~read, 0)
            else:
                read = taken.bool()
            allowed = allowed & (place >= 0)[:, None, None, :] & read
        allowed = allowed | ~query  # nobody reads a filler, so it may read anything
        if muted or rows.lonely:  # a row with nothing left to read reads itself
            itself = torch.eye(tall, wide, dtype=torch.bool, device=device).roll(wide - tall, dims=1)
            allowed = allowed | (itself & ~allowed.any(-1, keepdim=True))
        if not like.is_floating_point():
            return allowed
        lowest = torch.finfo(like.dtype).min
        mask = torch.zeros_like(allowed, dtype=like.dtype) if bias is None else bias.to(like.dtype)
        return mask.masked_fill(~allowed, lowest)

    def index(self, rows: _Rows, device: torch.device) -> Tensor:
        """The token of each row, [B, T]."""
        if rows.index is not None:
            return rows.index.to(device)
        return torch.arange(self.shape[1], device=device).expand(self.shape)

    def last_row(self, rows: _Rows) -> Tensor:
        """Where the last token of each sample has its row, [B]."""
        if rows.index is None:
            return self.last
        return torch.full_like(self.last, rows.index.shape[1] - 1)


def _muted_pairs(muted: list[_Action], reader: Tensor, kind: Tensor) -> Tensor:
    """Which columns [B, T] of ``kind`` are muted for which rows [B, Q] of kind ``reader``: [B, Q, T]."""
    pairs = torch.zeros(*reader.shape, kind.shape[1], dtype=torch.bool, device=kind.device)
    for action in muted:
        pairs |= _readers(action, reader)[:, :, None] & _muted_columns(action, kind)[:, None, :]
    return pairs


def _readers(action: _Action, kind: Tensor) -> Tensor:
    """Which rows of ``kind`` an action concerns."""
    if action.readers == "all":
        return torch.ones_like(kind, dtype=torch.bool)
    return (kind == _TEXT) if action.readers == "text" else (kind != _TEXT)


def _muted_columns(action: _Action, kind: Tensor) -> Tensor:
    """Which columns of ``kind`` an action mutes."""
    return kind != _TEXT if action.columns == "all" else kind == _FIRST_HALF


def _sunk(values: Tensor, columns: _Columns, sinks: list[_Action]) -> Tensor:
    """Values [B, H_kv, T, D] as readers under ``sinks`` find them.

    Attention is linear in the values: setting a column's value to zero sets its weight to zero after the softmax,
    and giving it the first visual token's value moves its weight onto that token. Where actions overlap, the last
    one counts.
    """
    if not sinks:
        return values
    kind = columns.kind.to(values.device)
    visual = (kind != _TEXT) & (columns.position >= 0).to(values.device)
    first = visual.int().argmax(1)
    out = values
    for action in sinks:
        muted = (_muted_columns(action, kind) & visual)[:, None, :, None]
        if action.sink == "zero":
            out = out.masked_fill(muted, 0)
        else:
            index = first[:, None, None, None].expand(-1, values.shape[1], 1, values.shape[3])
            out = torch.where(muted, values.gather(2, index), out)
    return out


def _last_row_numbers(weights: Tensor, values: Tensor) -> dict[str, Tensor]:
    """Scores of the columns for one query row per sample, each [B, T].

    With c_i the concatenation over heads of w_i v_i and o their sum over all columns: ``contribution`` ||c_i||_2,
    ``attention`` the mean of w_i over heads, ``cosine`` cos(o - c_i, o) (VisiPruner, arXiv 2510.17205).

    Args:
        weights: attention weights [B, H, T].
        values: [B, H_kv, T, D].
    """
    wide = torch.float64 if values.dtype == torch.float64 else torch.float32
    batch, _, columns = weights.shape
    w = weights.to(wide).view(batch, values.shape[1], -1, columns)
    v = values.to(wide)
    output = w @ v
    square = torch.einsum("bkgt,bkt->bt", w.square(), v.square().sum(-1))
    product = (w * (output @ v.transpose(2, 3))).sum((1, 2))
    total = output.square().sum((1, 2, 3))[:, None]
    rest = (total - 2 * product + square).clamp(min=0).sqrt()
    # the smallest denominator is that of torch's cosine_similarity: a token that is all of the output has cosine 0
    cosine = ((total - product) / (rest * total.sqrt()).clamp(min=1e-8)).clamp(-1, 1)
    return {"contribution": square.sqrt(), "attention": w.mean((1, 2)), "cosine": cosine}


# ---------------------------------------------------------------------------------------------- the hooks


@dataclass(frozen=True)
class Trace:
    """What a schedule did to the samples of one prompt.

    Attributes:
        samples: one dict per batch row: ``visual`` (number of visual tokens), ``text`` (of the others, without
            padding), ``starts`` (per withdraw or keep action, in order: the layer at which it started, None if it
            did not), ``kept`` (per ``keep`` action, by its number among those: the kept tokens, counted among the
            sample's visual tokens from 0; None if it did not start), ``visual_per_layer`` (visual tokens present
            in each layer).
        rows_per_layer: rows of hidden states computed in each layer, fillers included; the same for all samples.
    """

    samples: list[dict[str, Any]]
    rows_per_layer: list[int]


def _traced(call: _Call) -> Trace:
    plan, samples = call.plan, []
    if call.visual is None:
        batch, length = call.shape
        text = [length] * batch if call.real is None else call.real.sum(1).tolist()
        starts = [a.at if a.at is not None and a.at < plan.depth else None for a in plan.leaving]
        kept: dict[int, Any] = {
            i: None if starts[i] is None else [] for i, a in enumerate(plan.leaving) if a.action == "keep"
        }
        none = [0] * plan.depth
        samples = [
            {"visual": 0, "text": n, "starts": starts, "kept": kept, "visual_per_layer": none} for n in text
        ]
        return Trace(samples, [length] * plan.depth)
    per_layer = torch.stack([p.sum(1) for p in call.present_at], 1).tolist()
    fired = [f.tolist() for f in call.fired]
    assert call.real is not None
    total = call.real.sum(1).tolist()
    for row, number in enumerate(call.number.tolist()):
        begun = [f[row] if f[row] >= 0 else None for f in fired]
        kept = {}
        for i, action in enumerate(plan.leaving):
            if action.action == "keep":
                kept[i] = None if begun[i] is None else call.ordinal[row, call.kept[i][row]].tolist()
        samples.append(
            {
                "visual": number,
                "text": total[row] - number,
                "starts": begun,
                "kept": kept,
                "visual_per_layer": per_layer[row],
            }
        )
    return Trace(samples, list(call.rows_at))


_not_compiled = torch.compiler.disable  # hooks decide by values, so under torch.compile they run as they are


class Pruning:
    """A schedule at work on a model; made by ``apply`` or ``pruned``.

    Several threads may run the model at once. A deep copy of the model carries a copy of this.
    """

    def __init__(
        self, model: torch.nn.Module, schedule: Mapping[str, Any], layout: Mapping[str, Any]
    ) -> None:
        path = layout["text_model"]
        try:
            text_model = model.get_submodule(path)
            layers: Any = text_model.layers
        except AttributeError as error:
            raise PruningError(
                f"{type(model).__name__} has no {path}.layers; give its family's layout"
            ) from error
        self.plan = _Plan(schedule, len(layers), int(layout.get("first_withdrawal", 0)))
        self.placeholders = tuple(layout["placeholder_ids"])
        self._calls: dict[int, _Call] = {}  # per thread, from the base model's start to the text model's
        self._traced: _Call | None = None
        self._handles: list[Any] = []
        self._caches: list[str] = []  # by which name each layer takes its cache
        if self.plan.idle:
            return
        base = model.get_submodule(path.rpartition(".")[0])
        _guard_hooks()
        self._caches = [cache_argument(layer, "hidden_states", "attention_mask") for layer in layers]
        add = self._handles.append
        add(base.register_forward_pre_hook(self._enter_base, with_kwargs=True))
        add(base.register_forward_hook(self._check_base))
        add(base.register_forward_hook(self._leave_base, always_call=True))
        add(text_model.register_forward_pre_hook(self._enter_text, with_kwargs=True))
        add(text_model.register_forward_hook(self._leave_text, with_kwargs=True))
        if base is not model:
            add(model.register_forward_pre_hook(self._check_labels, with_kwargs=True))
        for index, layer in enumerate(layers):
            add(layer.register_forward_pre_hook(partial(self._enter_layer, index), with_kwargs=True))
            if self.plan.frozen(index):
                add(layer.register_forward_hook(self._leave_layer, with_kwargs=True))
            if self.plan.may_probe(index) or self.plan.mutes_in(index):
                attention = getattr(layer, "self_attn", None)
                try:
                    if attention is None:
                        raise _strange(f"layer {index} has no self_attn")
                    cache_argument(attention, "hidden_states", "attention_mask")
                except PruningError:
                    self.remove()
                    raise
                add(attention.register_forward_hook(self._leave_attention, with_kwargs=True))

    @property
    def trace(self) -> Trace | None:
        """What happened to the last prompt, in whichever thread it ran; None before the first, and if the schedule
        never does anything."""
        return None if self._traced is None else _traced(self._traced)

    def remove(self) -> None:
        """Take every hook away."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    # ------------------------------------------------------------------ where the ids are

    def _visual(self, module: torch.nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> Tensor | None:
        """Which tokens are visual [B, S]; None if none is. A placeholder id without vision inputs is text."""
        given = _arguments(module, args, kwargs)
        ids = given.get("input_ids")
        if ids is None:
            if given.get("inputs_embeds") is None:
                return None
            raise PruningError(
                "inputs_embeds do not tell where the images are; pass input_ids with the vision inputs"
            )
        if not any(name.startswith(_VISION_INPUTS) and _holds(value) for name, value in given.items()):
            return None
        visual = torch.isin(ids, torch.tensor(self.placeholders, device=ids.device))
        return visual if bool(visual.any()) else None

    @_not_compiled
    def _check_labels(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = _arguments(module, args, kwargs)
        labels, keep = given.get("labels"), given.get("logits_to_keep")
        measured = any(a.measured or a.at is None for a in self.plan.leaving)
        if measured and isinstance(keep, int) and keep > 1 and _given_cache(given) is not None:
            visual = self._visual(module, args, kwargs)
            if visual is not None:
                raise PruningError(
                    "assisted decoding puts guessed tokens behind the prompt, so its last row is not known; "
                    "generate without an assistant under a schedule with measured scores or 'auto'"
                )
        if labels is None or not self.plan.leaving:
            return
        visual = self._visual(module, args, kwargs)
        if visual is not None and bool(((labels[:, 1:] != -100) & visual[:, :-1].to(labels.device)).any()):
            raise PruningError(
                "a label is predicted from a visual token, which the schedule may remove; set the labels of "
                "visual tokens and of the first token behind them to -100"
            )

    @_not_compiled
    def _enter_base(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        visual = self._visual(module, args, kwargs)
        given = _arguments(module, args, kwargs)
        ids, mask = given.get("input_ids"), given.get("attention_mask")
        if ids is None:
            return
        self._calls[threading.get_ident()] = _Call(
            self.plan, visual, _not_padding(mask, ids), tuple(ids.shape)
        )

    @_not_compiled
    def _check_base(self, module: torch.nn.Module, args: tuple, output: Any) -> None:
        if threading.get_ident() in self._calls:
            raise _strange("the model did not call its text model")

    @_not_compiled
    def _leave_base(self, module: torch.nn.Module, args: tuple, output: Any) -> None:
        self._calls.pop(threading.get_ident(), None)

    @_not_compiled
    def _enter_text(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        call = self._calls.pop(threading.get_ident(), None)
        if call is None:
            raise PruningError("the text model was called on its own; call the whole model under a schedule")
        _kind(module)  # refuses what is not supported before masks are made for it
        return args, {**kwargs, _CALL: call}

    @_not_compiled
    def _leave_text(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        call = kwargs[_CALL]
        hidden = output[0]
        rows = call.finish()
        call.check_rows(self.plan.depth - 1, hidden)
        if call.visual is not None or call.past == 0:
            self._traced = call
        if rows is None or rows.index is None:
            return output
        index, query = rows.index.to(hidden.device), rows.query.to(hidden.device)
        batch, length = call.shape
        # fillers go to a slot behind the last, which is cut off
        place = index.masked_fill(~query, length)[:, :, None].expand(-1, -1, hidden.shape[2])
        whole = hidden.new_zeros(batch, length + 1, hidden.shape[2]).scatter(1, place, hidden)[:, :length]
        if isinstance(output, tuple):
            return (whole, *output[1:])
        output = copy.copy(output)
        output.last_hidden_state = whole
        return output

    # ------------------------------------------------------------------ layers

    @_not_compiled
    def _enter_layer(
        self, index: int, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        kwargs = dict(kwargs)
        call: _Call | None = kwargs.pop(_CALL, None)
        if call is None:
            raise _strange(f"layer {index} was called outside of its model under a schedule")
        if len(args) > 1:
            raise _strange("the layers get more than one positional argument")
        if args:
            kwargs["hidden_states"] = args[0]
        hidden: Any = kwargs.get("hidden_states")
        cache, name = _given_cache(kwargs), self._caches[index]
        call.enter(index, hidden)
        for known in _CACHE_NAMES:
            kwargs.pop(known, None)
        kwargs[name] = cache
        if index == 0:
            self._greet(cache, call)
        elif cache is not call.cache and not call.over:
            raise _strange(f"layer {index} gets another cache than layer 0")
        before, rows = call.at.get(index - 1), call.rows(index, hidden.device)
        acts = call.visual is not None and (self.plan.mutes_in(index) or self.plan.frozen(index))
        probes = call.visual is not None and call.probes(index)
        held = getattr(cache, "layers", [])[index : index + 1]
        if rows.index is not None or acts or probes or (held and isinstance(held[0], PrunedLayer)):
            attention: Any = getattr(module, "self_attn", None)
            self._change(index, attention, call, before, rows, acts, probes, kwargs)
            training = getattr(module, "gradient_checkpointing", False) and module.training
            if training and isinstance(kwargs[name], _Tap):
                raise PruningError(
                    "gradient checkpointing does not go with sinks, freeze, scores or conditions"
                )
        if args:
            args = (kwargs.pop("hidden_states"),)
        return args, kwargs

    def _greet(self, cache: Any, call: _Call) -> None:
        """Refuse a cache that was filled otherwise, since what its entries are is not known."""
        call.cache = cache
        if cache is None:
            return
        if not hasattr(cache, "get_seq_length"):
            raise PruningError(
                f"{type(cache).__name__} is not supported under a schedule; use a DynamicCache"
            )
        call.past = cache.get_seq_length()
        if call.past and getattr(cache, "vtw_schedule", None) != self.plan.key:
            raise PruningError("this cache was not filled under this schedule; start with an empty one")
        cache.vtw_schedule = self.plan.key

    def _change(
        self,
        index: int,
        attention: Any,
        call: _Call,
        before: _Rows | None,
        rows: _Rows,
        acts: bool,
        probes: bool,
        kwargs: dict[str, Any],
    ) -> None:
        """Change a layer's arguments into those of the rows that run in it."""
        name = self._caches[index]
        hidden, cache, length = kwargs["hidden_states"], kwargs[name], call.shape[1]
        columns, past, skips, given = None, 0, False, kwargs.get("attention_mask")
        prefill = call.visual is not None
        if cache is None:
            columns = call.columns(None, rows, 0, hidden.device)
        else:
            layer = _cache_layer(cache, index)
            past = layer.get_seq_length()
            if not isinstance(layer, PrunedLayer) and (rows.index is not None or acts):
                layer = cache.layers[index] = PrunedLayer(layer, call.shape[0], hidden.device)
            if isinstance(layer, PrunedLayer):
                if call.visual is not None:
                    layer.recall()
                elif self.plan.text_skips(index, prefill):
                    layer.set_aside(call.memo)
                columns = call.columns(layer.columns, rows, past, hidden.device)
                layer.expect(columns, length)
        _check_arguments(kwargs, {length, past + length} - {1})
        if columns is not None:
            skips = call.visual is not None and columns.visual and self.plan.text_skips(index, prefill)
            muted = self.plan.masks(index, prefill) if columns.visual else []
            if skips:  # text rows get a pass of their own over text, which spares all others a mask
                muted = [a for a in muted if a.readers != "text"]
            kwargs["attention_mask"] = call.mask(given, rows, columns, past, muted, hidden, attention)
        if rows.index is not None:
            self._gather(call, before, rows, attention, kwargs)
        sinks = self.plan.sinks(index, prefill) if columns is not None and columns.visual else []
        text, visual = _split(sinks)
        second = None if call.visual is None or text == visual or skips else text
        base = text if call.visual is None else visual
        due = probes or skips or second is not None
        if base or due or (acts and self.plan.frozen(index)):
            call.tap = _Tap(cache, call, index, rows, columns, past, base, second, skips, given, probes, due)
            kwargs[name] = call.tap

    def _gather(
        self, call: _Call, before: _Rows | None, rows: _Rows, attention: Any, kwargs: dict[str, Any]
    ) -> None:
        """Gather the rows of everything that has one per token."""
        if before is not rows:
            slots = rows.index if before is None else call.slots(before, rows)
            kwargs["hidden_states"] = _take(kwargs["hidden_states"], slots, 1)
        assert rows.index is not None
        _take_positions(kwargs, rows.index, call.shape[1], attention)

    @_not_compiled
    def _leave_layer(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """Put back the visual rows of a frozen layer."""
        tap = _given_cache(kwargs)
        if not isinstance(tap, _Tap) or tap.call.visual is None:
            return output
        if not self.plan.frozen(tap.layer):
            return output
        before = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        after = output[0] if isinstance(output, tuple) else output
        if not isinstance(after, torch.Tensor) or after.shape != before.shape:
            raise _strange(f"layer {tap.layer} does not return hidden states of the shape it is given")
        visual = tap.call.kinds(tap.rows, before.device)[:, :, None] != _TEXT
        if isinstance(output, tuple):
            return (torch.where(visual, before, output[0]), *output[1:])
        return torch.where(visual, before, output)

    # ------------------------------------------------------------------ attention

    @_not_compiled
    def _leave_attention(
        self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Run text rows again with the values their mutes leave them; look at the last row's attention."""
        tap = _given_cache(kwargs)
        if not isinstance(tap, _Tap):
            return output
        tap.due = False
        if tap.keys is None or tap.values is None:
            raise _strange("the attention of this model does not hand its keys to the cache")
        given = dict(kwargs)
        if len(args) > 1:
            raise _strange("the attention gets more than one positional argument")
        given["hidden_states"] = hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        if not isinstance(output, tuple) or output[0].shape != hidden.shape:
            raise _strange(f"the attention of layer {tap.layer} does not return its rows first in a tuple")
        if tap.skips or tap.second is not None:
            rows, part = self._text_again(module, given, tap)
            assert rows.index is not None
            # fillers go to a slot behind the last, which is cut off
            place = rows.index.masked_fill(~rows.query, hidden.shape[1])[:, :, None].expand_as(part)
            room = torch.cat([output[0], output[0].new_zeros(output[0].shape[0], 1, part.shape[2])], 1)
            output = (room.scatter(1, place, part)[:, :-1], *output[1:])
        if tap.probes:
            with torch.no_grad():
                tap.call.probe = self._probe(module, given, tap)
        return output

    def _text_again(self, module: Any, given: dict[str, Any], tap: _Tap) -> tuple[_Rows, Tensor]:
        """Run the attention for the text rows alone; returns where they are and their output [B, T', D]."""
        call, columns, device = tap.call, tap.columns, given["hidden_states"].device
        assert columns is not None and tap.keys is not None and tap.values is not None
        key = ("text", id(tap.rows), tap.skips)
        if key not in call.memo:
            text, tokens = (call.kinds(tap.rows, device) == _TEXT) & tap.rows.query.to(device), tap.rows
            if (
                "flash" in _kind(module) and not tap.skips
            ):  # its causal alignment needs a row for each new entry
                here = _Rows(torch.arange(text.shape[1], device=device).expand(text.shape), text, text)
            else:
                here = _compact(text)
                assert here.index is not None
                tokens = replace(here, index=call.index(tap.rows, device).gather(1, here.index))
            call.memo[key] = here, tokens, tap.rows
        here, tokens, _ = call.memo[key]
        keys, values = tap.keys, _sunk(tap.values, columns, tap.second or [])
        if tap.skips:
            memo = ("text columns", id(columns))
            if memo not in call.memo:
                only = _compact((columns.position >= 0) & (columns.kind == _TEXT))
                call.memo[memo] = only, columns.gather(only), columns
            only, columns, _ = call.memo[memo]
            keys, values = _take(keys, only.index, 2), _take(values, only.index, 2)
        mask = call.mask(tap.given, tokens, columns, tap.past, [], given["hidden_states"], module)
        return here, _attend(module, given, here.index, mask, keys, values)[0]

    def _probe(self, module: Any, given: dict[str, Any], tap: _Tap) -> dict[str, Tensor]:
        """Scores of the chunk's tokens [B, S], from the last row of each sample.

        The module's own code runs for that one row, on its eager path because only that one returns the weights:
        q_last K over H x T, whatever attention the layer itself uses.
        """
        call = tap.call
        one = copy.copy(
            module
        )  # the weights are shared; the configuration is its own: no other thread sees it
        one.config = copy.copy(module.config)
        one.config._attn_implementation = "eager"
        one.training = False
        one.__dict__.pop("forward", None)  # as wrapped by accelerate it would run the original
        if any(p.is_meta for p in one.parameters()):
            raise PruningError("scores and conditions do not go with weights offloaded to CPU or disk")
        assert tap.keys is not None and tap.values is not None
        last = call.last_row(tap.rows).to(given["hidden_states"].device)[:, None]
        mask = given.get("attention_mask")
        if mask is not None and mask.ndim == 2:
            mask = mask[:, None, None, :].bool()
        elif mask is not None:
            rows = torch.arange(len(last), device=mask.device)[:, None]
            mask = mask.expand(len(last), *mask.shape[1:])[rows, :, last.to(mask.device)].transpose(1, 2)
        if mask is not None and mask.dtype == torch.bool:
            like = given["hidden_states"]
            mask = torch.zeros_like(mask, dtype=like.dtype).masked_fill(~mask, torch.finfo(like.dtype).min)
        weights = _attend(one, given, last, mask, tap.keys, tap.values)[1]
        if weights is None:
            raise _strange("the eager attention of this model returns no weights")
        numbers = _last_row_numbers(weights[:, :, 0], tap.values)
        batch, length = call.shape
        device = call.last.device
        wide = tap.keys.shape[2]
        if tap.columns is not None:
            position = tap.columns.position.to(device)
        else:
            total = tap.past + length
            position = torch.arange(total - wide, total, device=device).expand(batch, wide)
        # entries of earlier turns and fillers go to a slot behind the last, which is cut off
        place = (position - tap.past).masked_fill(position < tap.past, length)
        room = {name: x.new_zeros(batch, length + 1, device=device) for name, x in numbers.items()}
        return {name: room[name].scatter(1, place, x.to(device))[:, :length] for name, x in numbers.items()}


def _attend(
    module: Any, given: dict[str, Any], index: Tensor, mask: Tensor | None, keys: Tensor, values: Tensor
) -> Any:
    """Run an attention module for the rows ``index`` [B, Q] of what it was ``given``, over these keys and values."""
    hidden = given["hidden_states"]
    given = {name: value for name, value in given.items() if name not in _CACHE_NAMES}
    given |= {"hidden_states": _take(hidden, index, 1), "attention_mask": mask}
    _take_positions(given, index, hidden.shape[1], module)
    given[cache_argument(module)] = fixed = _Fixed(keys, values)
    output = module.forward(**given)
    if fixed.asked != 1 or not isinstance(output, tuple) or len(output) < 2:
        raise _strange("the attention of this model does not ask its cache once, or returns no tuple")
    return output


def cache_argument(module: torch.nn.Module, *more: str) -> str:
    """The name by which a module takes the cache.

    Raises:
        PruningError: it takes none or several, or not what ``more`` names.
    """
    names = inspect.signature(module.forward).parameters
    found = [name for name in _CACHE_NAMES if name in names]
    if len(found) != 1 or not names.keys() >= set(more):
        raise _strange(
            f"{type(module).__name__} takes {', '.join(names)}, not one of {', '.join((*_CACHE_NAMES, *more))}"
            if not found
            else f"{type(module).__name__} takes {', '.join(names)}, where {', '.join((found[0], *more))} is known"
        )
    return found[0]


def _given_cache(given: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a call, whatever its name there; None if there is none.

    Raises:
        PruningError: there are several, or one that goes by another name.
    """
    caches = {id(value): value for name in _CACHE_NAMES if (value := given.get(name)) is not None}
    for name, value in given.items():
        if name not in _CACHE_NAMES and hasattr(value, "update") and hasattr(value, "get_seq_length"):
            raise _strange(f"a cache is given by the name {name}")
    if len(caches) > 1:
        raise _strange(f"two caches are given, as {' and '.join(n for n in _CACHE_NAMES if given.get(n))}")
    return next(iter(caches.values()), None)


def _check_arguments(given: Mapping[str, Any], lengths: set[int]) -> None:
    """Refuse a layer's argument that is not known and has a size for each token or entry, ``lengths``."""
    for name, value in given.items():
        if name in _PER_TOKEN or name.startswith(_POSITIONS):
            continue
        for part in value if isinstance(value, tuple | list) else (value,):
            if isinstance(part, torch.Tensor) and lengths.intersection(part.shape):
                raise _strange(f"the layers get {name}, with a row for each token")


def _flash_mask(
    given: Tensor | None, rows: _Rows, columns: _Columns, total: int, muted: list[_Action], window: int | None
) -> Tensor | None:
    """The two-dimensional mask [B, T] that flash attention wants for ``columns``, of ``total`` tokens seen."""
    if muted or rows.lonely or (given is not None and given.ndim != 2) or total > (window or math.inf):
        raise PruningError(
            "flash attention cannot mask visual readers or half of the visual columns, end a prompt with an image, "
            "take a mask of four dimensions or a sliding window under a schedule; use sdpa"
        )
    position = columns.position
    if given is None:
        return (position >= 0).long() if columns.ragged else None
    place = position.to(given.device) - (total - given.shape[-1])
    return given.gather(1, place.clamp(min=0)) * (place >= 0).to(given.dtype)


def _split(sinks: list[_Action]) -> tuple[list[_Action], list[_Action]]:
    """The actions on text rows and those on visual rows."""
    return [a for a in sinks if a.readers != "visual"], [a for a in sinks if a.readers != "text"]


def _guard_hooks() -> None:
    """Let torch.compile look at hooks before it runs what it compiled: by default code that was compiled for a model
    without hooks also serves one of the same class with hooks, and leaves them out."""
    import torch._dynamo.config as dynamo

    if getattr(dynamo, "skip_nnmodule_hook_guards", False):
        dynamo.skip_nnmodule_hook_guards = False
        torch.compiler.reset()


def _arguments(module: torch.nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name."""
    names = [n for n in inspect.signature(module.forward).parameters if n != "self"] if args else []
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _kind(attention: Any) -> str:
    """The attention implementation of a module."""
    kind = getattr(getattr(attention, "config", None), "_attn_implementation", None) or "eager"
    if "flex" in kind or "paged" in kind:
        raise PruningError(f"{kind} is not supported under a schedule; use sdpa, eager or flash attention")
    return kind


def _holds(value: Any) -> bool:
    """Whether an input was given; a mapping, whether any of its values was."""
    if isinstance(value, Mapping):
        return any(v is not None for v in value.values())
    return value is not None


def _not_padding(mask: Any, ids: Tensor) -> Tensor | None:
    """Which tokens of the chunk are real [B, S], from a 2-D mask or, in a 4-D one, from somebody reading them."""
    if not isinstance(mask, torch.Tensor):
        return None
    if mask.ndim == 4:
        read = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min
        mask = read.any(2).any(1)
    return mask[:, -ids.shape[1] :].bool().to(ids.device).expand(ids.shape)


# ---------------------------------------------------------------------------------------------- the entrance


def apply(model: torch.nn.Module, schedule: Mapping[str, Any], layout: Mapping[str, Any]) -> Pruning:
    """Run ``schedule`` on every call of ``model`` from now on; ``remove`` undoes it.

    Args:
        schedule: canonical form, see the top of this file.
        layout: ``text_model``, ``placeholder_ids`` and optionally ``first_withdrawal``.

    Raises:
        PruningError: the schedule cannot be executed on this model, or one is at work already.
    """
    if "vtw_pruning" in model.__dict__:
        raise PruningError("a schedule is at work on this model already; remove it first")
    pruning = Pruning(model, schedule, layout)
    model.__dict__["vtw_pruning"] = pruning
    return pruning


def remove(model: torch.nn.Module) -> None:
    """Undo ``apply``; nothing happens if no schedule is at work."""
    pruning = model.__dict__.pop("vtw_pruning", None)
    if pruning is not None:
        pruning.remove()


@contextmanager
def pruned(
    model: torch.nn.Module, schedule: Mapping[str, Any], layout: Mapping[str, Any]
) -> Iterator[Pruning]:
    """Run ``schedule`` on ``model`` inside a ``with`` block; yields the ``Pruning`` with its ``trace``.

    Raises:
        PruningError: as ``apply``; also by the model's calls, where exactness cannot be kept.
    """
    pruning = apply(model, schedule, layout)
    try:
        yield pruning
    finally:
        remove(model)
