"""Layers of a static cache that hold only some of the tokens they have seen.

A prompt runs eagerly. The layers that a schedule touches gather their entries in a ``PromptLayer``, as in a dynamic
cache; behind the prompt each becomes a ``StaticPrunedLayer`` of its own length: the entries that text may still read,
and room for as many tokens as the static cache it was asked for still takes. From then on nothing depends on values:
each step of one token writes one slot and gathers the mask's columns, so that it compiles into one graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from vtwcli.runtime.asking import not_compiled
from vtwcli.runtime.cache import PrunedLayer
from vtwcli.runtime.contract import CACHE_NAMES, CALL, PruningError, attention_kind, brings_vision, strange
from vtwcli.runtime.masks import muted_columns, split_sinks, sunk
from vtwcli.runtime.plan import Plan
from vtwcli.runtime.rows import Tensor, take

_ROWS = (
    "input_ids",
    "inputs_embeds",
    "hidden_states",
)  # what has an axis for tokens behind that of the batch

OLDEST = (5, 20)  # release of transformers whose static layers are built as they are here
INSTEAD = "use a DynamicCache (leave cache_implementation unset)"


class PromptLayer(PrunedLayer):
    """Holds a prompt's entries where the layer of a static cache will.

    Args:
        layer: the library's, empty.
        batch: number of rows B.
        device: of the keys.
        attention: the module it is for.
    """

    def __init__(self, layer: StaticLayer, batch: int, device: torch.device, attention: Any) -> None:
        sliding = isinstance(layer, StaticSlidingWindowLayer)
        stock = DynamicSlidingWindowLayer(layer.max_cache_len) if sliding else DynamicLayer()
        super().__init__(stock, batch, device)
        self.stock = layer
        self.room = room_of(layer, getattr(attention, "sliding_window", None))


class StaticPrunedLayer(StaticLayer):
    """A layer of a static cache without some of the tokens it has seen.

    ``keys`` and ``values`` [B, H_kv, C, D] have C slots; ``position`` [B, C] tells which token of the whole sequence
    (padding included) each holds, -1: none. Slots are filled in order, those of a sliding window in turn.

    Args:
        layer: the entries of the prompt.
        plan: the schedule.
        index: of the layer.
        room: how many tokens the cache takes in all; None if it is not known.
    """

    is_croppable = False

    def __init__(self, layer: PromptLayer, plan: Plan, index: int, room: int | None) -> None:
        super().__init__(max_cache_len=layer.stock.max_cache_len)
        assert layer.keys is not None and layer.values is not None
        self.stock = layer.stock
        self.is_sliding = bool(layer.is_sliding)
        columns, position, values = layer.columns, layer.columns.position, layer.values
        if columns.visual:  # who comes is text
            for action in plan.masks(index, prefill=False):
                if action.readers != "visual":
                    position = position.masked_fill(muted_columns(action, columns.kind), -1)
            sinks = split_sinks(plan.sinks(index, prefill=False))[0]
            if layer.is_sliding and layer.room is None and any(action.sink == "first" for action in sinks):
                raise PruningError(
                    f"the window of layer {index} slides, and with it the first visual token that its mute reads, "
                    f"which a static cache cannot follow; let the mute's 'during' be prefill, or {INSTEAD}"
                )
            values = sunk(values, columns, sinks)
        if self.is_sliding:
            position = position.masked_fill(position <= layer.seen - self.max_cache_len, -1)
        held = max(int((position >= 0).sum(1).max()), 1)
        order = position.argsort(1)[:, -held:]
        slots = self.max_cache_len if room is None else held + max(room - layer.seen, 0)
        slots = min(slots, self.max_cache_len) if self.is_sliding else slots
        self.keys, self.values = (
            torch.cat([taken, taken.new_zeros(*taken.shape[:2], slots - held, taken.shape[3])], 2)
            for taken in (take(layer.keys, order, 2), take(values, order, 2))
        )
        self.dtype, self.device, self.is_initialized = self.keys.dtype, self.keys.device, True
        empty = position.new_full((len(position), slots - held), -1)
        self.position = torch.cat([position.gather(1, order), empty], 1).to(self.device)
        self.cumulative_length = torch.tensor(layer.seen, device=self.device)
        self.seen = (
            layer.seen if self.is_sliding else 0
        )  # as a number, of which masks of sliding layers are made
        self.gone = layer.seen - held
        self.awaited = False
        for x in (self.keys, self.values, self.position, self.cumulative_length):
            torch._dynamo.mark_static_address(x)

    def _slot(self) -> Tensor:
        slot = (self.cumulative_length - self.gone).reshape(1)
        return slot % self.position.shape[1] if self.is_sliding else slot

    def mask(self, given: Any) -> Tensor:
        """The mask [B, 1 or H, 1, C] of a step that is about to come, out of the one the model made for it.

        Args:
            given: additive or boolean, [B or 1, 1 or H, 1, W], over the last tokens, slots to come included.
        """
        if self.awaited or not isinstance(given, torch.Tensor) or given.ndim != 4 or given.shape[2] != 1:
            raise strange(
                "a step on a static cache has no mask of four dimensions, or the one before did not end"
            )
        self.awaited = True
        batch = self.position.shape[0]
        self.position.index_copy_(1, self._slot(), self.cumulative_length.reshape(1, 1).expand(batch, 1))
        # where a sliding layer's mask begins
        first = (self.cumulative_length + 1 - given.shape[-1]).clamp(min=0)
        place = (self.position - first)[:, None, None]
        given = given.to(self.position.device).expand(batch, -1, -1, -1)
        taken = given.gather(3, place.clamp(min=0).expand(-1, given.shape[1], -1, -1))
        if taken.dtype == torch.bool:
            return taken & (place >= 0)
        return taken.masked_fill(place < 0, torch.finfo(taken.dtype).min)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write one token's entries; returns all slots, as the library's layers do."""
        if not self.awaited:
            raise PruningError(
                "this cache was filled under a schedule; continue it under the same schedule, or start a new one"
            )
        assert self.keys is not None and self.values is not None
        self.awaited = False
        slot = self._slot()
        self.keys.index_copy_(2, slot, key_states)
        self.values.index_copy_(2, slot, value_states)
        self.cumulative_length.add_(1)
        if self.is_sliding:
            self.seen += 1
        return self.keys, self.values

    def get_seq_length(self) -> Any:
        """Number of tokens seen, not of entries held."""
        return self.cumulative_length

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """Length and offset of the masks the model makes, as of the library's layer."""
        return self.max_cache_len, max(self.seen - self.max_cache_len + 1, 0)

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.position.fill_(-1)
        self.seen, self.gone, self.awaited = 0, 0, False

    def crop(self, tokens_to_remove: int) -> None:
        """Refused."""
        raise PruningError("a static cache under a schedule cannot forget single tokens; use a DynamicCache")

    def reorder_cache(self, beam_idx: Any) -> None:
        """Take these rows of the batch."""
        super().reorder_cache(beam_idx)
        self.position = self.position.index_select(0, beam_idx.to(self.position.device))


def room_of(layer: Any, window: int | None) -> int | None:
    """How many tokens the cache of a library's layer takes; None if the layer does not tell: a sliding one is as long
    as its ``window`` or the whole cache, whichever is less."""
    if isinstance(layer, StaticSlidingWindowLayer):
        return layer.max_cache_len if window is not None and layer.max_cache_len < window else None
    return layer.max_cache_len if isinstance(layer, StaticLayer) else None


def is_static(cache: Any) -> bool:
    """Whether a cache has static layers."""
    return any(isinstance(layer, StaticLayer | PromptLayer) for layer in getattr(cache, "layers", None) or ())


def greet(cache: Any, plan: Plan, attention: Any) -> None:
    """Make a static cache ready for a prompt.

    Raises:
        PruningError: it has seen tokens, or nothing static can be made under this schedule, model or release.
    """
    if not plan.fixed:
        raise PruningError(
            "under 'auto' or a threshold each prompt decides anew how many entries a layer holds, so a static cache "
            f"has no lengths to fix; name layers, counts or ratios in the schedule, or {INSTEAD}"
        )
    if plan.trims:
        raise PruningError(
            "what leaves during the answer ('every') cannot leave a static cache, whose layers keep their lengths; "
            f"leave it out, or {INSTEAD}"
        )
    if plan.renumbers:
        raise PruningError(
            "with positions: compact the steps behind a prompt have other positions in each layer, which is not done "
            f"on a static cache; use positions: original, or {INSTEAD}"
        )
    if tuple(map(int, transformers.__version__.split(".")[:2])) < OLDEST:
        raise PruningError(
            f"static caches under a schedule need transformers {'.'.join(map(str, OLDEST))} or later; upgrade, "
            f"or {INSTEAD}"
        )
    if "flash" in attention_kind(attention):
        raise PruningError(
            f"flash attention reads no static cache under a schedule, whose masks have four dimensions; use sdpa, or "
            f"{INSTEAD}"
        )
    if getattr(cache, "offloading", False):
        raise PruningError(f"an offloaded static cache is not supported under a schedule; {INSTEAD}")
    if int(cache.get_seq_length()):
        if getattr(cache, "vtw_static", None) != plan.key:
            raise PruningError("this cache was not filled under this schedule; start with an empty one")
        raise PruningError(
            "behind a prompt, a static cache under a schedule takes one token at a time; start a new one for each "
            f"prompt, or {INSTEAD}"
        )
    cache.layers[:] = [x.stock if isinstance(x, StaticPrunedLayer | PromptLayer) else x for x in cache.layers]
    cache.vtw_static = None


def settle(cache: Any, plan: Plan) -> None:
    """Give the layers of a static cache that a prompt's schedule touched their own lengths, behind the prompt."""
    rooms = [x.room if isinstance(x, PromptLayer) else room_of(x, None) for x in cache.layers]
    whole = max((room for room in rooms if room), default=None)
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, PromptLayer):
            cache.layers[index] = StaticPrunedLayer(layer, plan, index, whole)
    cache.vtw_static = plan.key


def stepped(args: tuple, kwargs: Mapping[str, Any], plan: Plan) -> Any:
    """The static cache of a call that adds one token to it behind a prompt under ``plan``, so that nothing is to be
    decided; None if this is another call.

    Looks at no value of a tensor: ``torch.compile`` follows it.

    Args:
        args, kwargs: of a model, its text model or a layer.
    """
    rows = next((kwargs[name] for name in _ROWS if kwargs.get(name) is not None), args[0] if args else None)
    if not isinstance(rows, torch.Tensor) or rows.shape[1] != 1 or CALL in kwargs or brings_vision(kwargs):
        return None
    for name in CACHE_NAMES:
        cache = kwargs.get(name)
        if cache is not None and getattr(cache, "vtw_static", None) == plan.key:
            return cache
    return None


def decides(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A hook of an object with a ``plan`` that decides by values: not run in steps on a static cache, and otherwise
    left as it is by torch.compile."""
    eager = not_compiled(hook)

    def run(self: Any, module: Any, args: tuple, kwargs: dict[str, Any], *output: Any) -> Any:
        return None if stepped(args, kwargs, self.plan) else eager(self, module, args, kwargs, *output)

    return run
