"""Cache layers that hold only some of the tokens they have seen."""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from vtwcli.runtime.contract import PruningError, strange
from vtwcli.runtime.rows import TEXT, Rows, Tensor, compact, take

NEVER = 1 << 30  # more layers than any model has


@dataclass(eq=False)
class Columns:
    """What the entries of a cache layer are; shared by layers, never changed in place.

    Attributes:
        position: index of each entry in the whole sequence (padding included), -1 where nobody may read, [B, T].
        kind: text or visual, [B, T] int8.
        ragged: whether some position is -1.
        visual: whether some kind may be visual.
        absent: positions of tokens that left in front of the model, so that later ones have lower position ids,
            [B, M], -1: none; or None.
        until: where later layers borrow the entries, the first that does not read each, [B, T]; None: all do.
        gone: indices of tokens whose positions those behind them have taken over, -1: none, [B, G]; or None.
    """

    position: Tensor
    kind: Tensor
    ragged: bool = False
    visual: bool = False
    absent: Tensor | None = None
    gone: Tensor | None = None
    until: Tensor | None = None
    picked: tuple[Any, Columns] | None = None

    def pick(self, rows: Tensor) -> Columns:
        """These rows of the batch; the layers of a cache all ask for the same ones in turn."""
        if self.picked is None or self.picked[0] is not rows:
            index = rows.to(self.position.device)
            absent = None if self.absent is None else self.absent[index]
            gone = None if self.gone is None else self.gone[index]
            until = None if self.until is None else self.until[index]
            position, kind = self.position[index], self.kind[index]
            taken = replace(
                self, position=position, kind=kind, absent=absent, gone=gone, until=until, picked=None
            )
            self.picked = (rows, taken)
        return self.picked[1]

    def slice(self, columns: slice | Tensor) -> Columns:
        """These entries."""
        position, kind = self.position[:, columns], self.kind[:, columns]
        until = None if self.until is None else self.until[:, columns]
        return replace(self, position=position, kind=kind, until=until, picked=None)

    def gather(self, rows: Rows) -> Columns:
        """The entries ``rows`` [B, T'], in each row of the batch its own."""
        assert rows.index is not None
        position = self.position.gather(1, rows.index).masked_fill(~rows.key, -1)
        kind = self.kind.gather(1, rows.index)
        until = None if self.until is None else self.until.gather(1, rows.index)
        return Columns(position, kind, rows.ragged, self.visual, self.absent, self.gone, until)

    def until_of(self, more: int) -> Tensor | None:
        """``until`` with as many ``more`` entries behind, which all layers read."""
        if self.until is None:
            return None
        return torch.cat([self.until, self.until.new_full((len(self.until), more), NEVER)], 1)


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
        self._coming: tuple[Columns, int] | None = None
        held = 0
        if layer.keys is not None and layer.values is not None and layer.keys.numel():
            self.keys, self.values, held = layer.keys, layer.values, layer.keys.shape[-2]
            self.dtype, self.device, self.is_initialized = layer.keys.dtype, layer.keys.device, True
        position = torch.arange(self.seen - held, self.seen, device=device).expand(batch, held)
        self.columns = Columns(position, torch.zeros(batch, held, dtype=torch.int8, device=device))

    def expect(self, columns: Columns, tokens: int) -> None:
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
                raise strange(
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
            there, visual = self.columns.position >= 0, self.columns.kind != TEXT
            parts = compact(there & ~visual), compact(there & visual)
            text, visual_columns = (self.columns.gather(part) for part in parts)
            memo[key] = (*parts, replace(text, visual=False), visual_columns, self.columns)
        rows, others, columns, other_columns, _ = memo[key]
        self.aside = copy.copy(self)
        self.aside.hold(others, other_columns)
        self.hold(rows, columns)

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
        self.columns = Columns(
            torch.cat([one.position, two.position], 1),
            torch.cat([one.kind, two.kind], 1),
            one.ragged or two.ragged,
            one.visual or two.visual,
            two.absent,
            two.gone,
        )

    def hold(self, rows: Rows, columns: Columns) -> None:
        """Hold these entries only, which are ``columns``."""
        assert self.keys is not None and self.values is not None
        self.keys, self.values = take(self.keys, rows.index, 2), take(self.values, rows.index, 2)
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
    def entries(self) -> int:
        """Number of entries held for each row of the batch, fillers and what lies aside included."""
        here = 0 if self.keys is None else int(self.keys.shape[-2])
        return here + (0 if self.aside is None else self.aside.entries)

    @property
    def awaited(self) -> bool:
        """Whether an announced ``update`` has not come."""
        return self._coming is not None

    def reset(self) -> None:
        """Forget everything."""
        self.keys = self.values = None
        self.is_initialized = False
        self.seen, self.aside, self._coming = 0, None, None
        self.columns = replace(self.columns.slice(slice(0, 0)), absent=None, gone=None)

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
        absent, gone = self.columns.absent, self.columns.gone
        absent = None if absent is None else absent.masked_fill(absent >= self.seen, -1)
        gone = None if gone is None else gone.masked_fill(gone >= self.seen, -1)
        columns = replace(self.columns, position=position, absent=absent, gone=gone).slice(stay)
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


def entries(cache: Any) -> list[int]:
    """Number of entries that each layer of a cache holds for each row of the batch.

    ``get_seq_length`` of a cache is the number of tokens that it has *seen*, under a schedule as without one.

    Args:
        cache: a ``DynamicCache``, filled under a schedule or not.
    """
    return [
        layer.entries if hasattr(layer, "entries") else 0 if layer.keys is None else int(layer.keys.shape[-2])
        for layer in cache.layers
    ]


_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer)


def cache_layer(cache: Any, index: int) -> Any:
    """The layer of a cache, created if need be."""
    layers = getattr(cache, "layers", None)
    if layers is None:
        raise PruningError(f"{type(cache).__name__} is not supported under a schedule; use a DynamicCache")
    if getattr(cache, "layer_class_to_replicate", None) is not None:
        while len(layers) <= index:
            layers.append(cache.layer_class_to_replicate())
    layer = layers[index]
    if type(layer) not in _LAYERS and not isinstance(layer, PrunedLayer):
        raise PruningError(
            f"a cache with {type(layer).__name__} is not supported under a schedule; use a DynamicCache "
            "(leave cache_implementation unset)"
        )
    return layer
