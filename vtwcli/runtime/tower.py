"""Taps in the vision tower: what its layers attend to, brought from patches to visual tokens.

The tower runs as it is. Behind a layer that a selector needs, its attention runs once more on what it was given, up to
queries and keys; of their products only the class token's row and the sums over rows are kept, block by block.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from vtwcli.runtime.attention import not_compiled
from vtwcli.runtime.contract import PruningError
from vtwcli.runtime.patches import Patches, tokens_of
from vtwcli.runtime.picture import Needs
from vtwcli.runtime.rows import Tensor
from vtwcli.runtime.weights import Chunk, looked_at

_NAMES = ("self_attn", "attn", "attention")  # of a layer's attention
_CLASS = ("class_embedding", "cls_token")  # parameters that are a class token


@dataclass(eq=False)
class Look:
    """What the tower showed of one image; fields as of ``Picture``, its number of visual tokens, and the row that
    the model made of the first."""

    tokens: int
    head: Tensor
    grid: tuple[int, int] | None
    depth: int
    cls: dict[int, Tensor] = field(default_factory=dict)
    received: dict[int, Tensor] = field(default_factory=dict)
    keys: dict[int, Tensor] = field(default_factory=dict)
    queries: dict[int, Tensor] = field(default_factory=dict)
    features: Tensor | None = None


@dataclass(eq=False)
class _Record:
    """What is seen while images become features."""

    stack: _Stack | None = None
    chunks: dict[int, list[Chunk]] = field(default_factory=dict)
    projected: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    hidden: dict[int, Tensor] = field(default_factory=dict)
    packed: tuple[tuple, dict[str, Any]] | None = None
    shape: tuple[int, int] | None = None  # images and rows
    busy: bool = False


@dataclass(eq=False)
class _Stack:
    """The layers of a tower.

    Attributes:
        owner: the module that has them.
        depth: their number.
        first: tokens in front of the patches.
        cls, received, keys, queries: the layers that are asked for, from 0.
        features: layers whose output the projector reads, in its order.
        heads: of its attention.
    """

    owner: torch.nn.Module
    depth: int
    first: int
    cls: list[int]
    received: list[int]
    keys: list[int]
    queries: list[int]
    features: list[int]
    heads: int


class _Stand:
    """Stands for a method of a module and tells ``see`` of its calls."""

    def __init__(self, inner: Callable[..., Any], see: Callable[..., Any]) -> None:
        self.inner, self.see = inner, see
        self.__signature__ = inspect.signature(inner)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.see(self.inner, args, kwargs)


class Tower:
    """The vision tower of a model under a selector.

    Args:
        base: the module whose ``get_image_features`` turns pixels into rows of the language model's input.
        text_model: its language model.
        needs: what the selector looks at.
        keep: takes the handles of hooks.

    Raises:
        PruningError: the model has no tower with attention, or not what the selector needs.
    """

    def __init__(
        self, base: torch.nn.Module, text_model: torch.nn.Module, needs: Needs, keep: Callable[[Any], None]
    ) -> None:
        self.base, self.needs = base, needs
        self._open: dict[int, _Record] = {}
        self._seen: dict[int, list[Look]] = {}
        if not hasattr(base, "get_image_features"):
            raise PruningError("this model has no vision tower whose attention could be asked for")
        found = [
            (name, module)
            for name, module in base.named_modules()
            if isinstance(module, torch.nn.ModuleList)
            and len(module)
            and not any(one is module for one in text_model.modules())
            and all(_attention(layer) is not None for layer in module)
        ]
        if not found:
            raise PruningError("this model has no vision tower whose attention could be asked for")
        for name, layers in found:
            self._hook(name, layers, keep)
        for name, see in (("get_image_features", self._look), ("pack_image_features", self._pack)):
            if hasattr(base, name):
                setattr(base, name, _Stand(getattr(base, name), see))
                keep(_Restore(base, name))

    def last(self) -> list[Look]:
        """What was last seen in this thread, image by image; ``generate`` without a cache asks for it again."""
        return self._seen.get(threading.get_ident(), [])

    def projector(self) -> torch.nn.Module:
        """What makes rows of the language model's input from features, one by one.

        Raises:
            PruningError: the family has none such.
        """
        found = getattr(self.base, "multi_modal_projector", None)
        if found is None:
            raise PruningError("this family's projector is not known to work token by token")
        return found

    # ------------------------------------------------------------------ hooks

    def _hook(self, name: str, layers: torch.nn.ModuleList, keep: Callable[[Any], None]) -> None:
        depth, needs = len(layers), self.needs
        top = self.base.get_submodule(name.partition(".")[0])
        first = int(any(n.rpartition(".")[2] in _CLASS for n, _ in top.named_parameters()))
        asked = [_from_start(part, depth) for part in (needs.cls, needs.received, needs.keys, needs.queries)]
        features: list[int] = []
        if needs.features:
            config: Any = self.base.config
            chosen = getattr(config, "vision_feature_layer", getattr(config, "vision_feature_layers", -1))
            chosen = [chosen] if isinstance(chosen, int) else list(chosen)
            features = [one - 1 if one > 0 else one + depth for one in chosen]
        if needs.soft and not first:
            asked, features = [[], sorted({*asked[0], *asked[1]}), [], []], []
        if (asked[0] or asked[2] or asked[3] or features) and not first:
            raise PruningError(
                "this model's vision tower has no class token, which the schedule's score looks at; take "
                "tower_received or another method"
            )
        cls, received, keys, queries = asked
        owner, one = self.base.get_submodule(name.rpartition(".")[0]), _attention(layers[0])
        heads = next((getattr(one, n) for n in ("num_heads", "num_attention_heads") if hasattr(one, n)), 1)
        stack = _Stack(owner, depth, first, cls, received, keys, queries, features, heads)
        for index, layer in enumerate(layers):
            attention = _attention(layer)
            assert attention is not None
            if index in stack.cls or index in stack.received:
                tap = partial(self._tap, stack, index)
                keep(attention.register_forward_hook(tap, with_kwargs=True))
            for part, wanted in (("k_proj", stack.keys), ("q_proj", stack.queries)):
                if index in wanted:
                    module = getattr(attention, part, None)
                    if module is None:
                        raise PruningError(f"the attention of this model's vision tower has no {part}")
                    keep(module.register_forward_hook(partial(self._projected, stack, part, index)))
            if index in stack.features or index == 0:
                keep(layer.register_forward_hook(partial(self._hidden, stack, index)))

    def _record(self, stack: _Stack) -> _Record | None:
        record = self._open.get(threading.get_ident())
        if record is None or record.busy:
            return None
        if record.stack not in (None, stack):
            raise PruningError(
                "this model has two vision towers for images; their attention is not understood"
            )
        record.stack = stack
        return record

    @not_compiled
    def _tap(self, stack: _Stack, index: int, module: Any, args: tuple, kwargs: Any, output: Any) -> None:
        record = self._record(stack)
        if record is None:
            return
        if any(p.is_meta for p in module.parameters()):
            raise PruningError("scores of the vision tower do not go with weights offloaded to CPU or disk")
        record.busy = True
        try:
            with torch.no_grad():
                chunks = looked_at(module, args, kwargs, index in stack.cls, index in stack.received)
        finally:
            record.busy = False
        record.chunks.setdefault(index, []).extend(chunks)

    @not_compiled
    def _projected(self, stack: _Stack, part: str, index: int, module: Any, args: tuple, output: Any) -> None:
        record = self._record(stack)
        if record is not None:
            record.projected[part, index] = output.detach()

    @not_compiled
    def _hidden(self, stack: _Stack, index: int, module: Any, args: tuple, output: Any) -> None:
        record = self._record(stack)
        if record is None:
            return
        hidden = (output[0] if isinstance(output, tuple) else output).detach()
        if index == 0:
            record.shape = (hidden.shape[0] if hidden.ndim == 3 else 1, hidden.shape[-2])
        if index in stack.features:
            record.hidden[index] = hidden

    # ------------------------------------------------------------------ images

    @not_compiled
    def _pack(self, inner: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        record = self._open.get(threading.get_ident())
        if record is not None and not record.busy:
            record.packed = (args, kwargs)
        return inner(*args, **kwargs)

    @not_compiled
    def _look(self, inner: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        me = threading.get_ident()
        if me in self._open:
            return inner(*args, **kwargs)
        record = self._open[me] = _Record()
        try:
            output = inner(*args, **kwargs)
            record.busy = True
            given = inspect.signature(inner).bind(*args, **kwargs).arguments
            with torch.no_grad():
                self._seen[me] = self._looks(record, given, output)
        finally:
            del self._open[me]
        return output

    def _looks(self, record: _Record, given: dict[str, Any], output: Any) -> list[Look]:
        stack, shape, needs = record.stack, record.shape, self.needs
        features = getattr(output, "pooler_output", output)
        if stack is None or shape is None:
            raise PruningError("this model's vision tower did not run through the layers that it has")
        try:
            patches = Patches(self.base, stack.owner, stack.first, shape, features, given, record.packed)
        except PruningError:
            if any(needs):
                raise
            tokens = tokens_of(features, given)  # which is all that is looked at
            return [Look(n, row, None, 0) for n, row in zip(tokens, _heads(features, tokens), strict=True)]
        looks = [
            Look(n, row, grid, stack.depth)
            for n, row, grid in zip(
                patches.tokens, _heads(features, patches.tokens), patches.grids, strict=True
            )
        ]
        for index, chunks in record.chunks.items():
            for name in ("cls", "received"):
                if index in getattr(stack, name):
                    parts = [getattr(chunk, name) for chunk in chunks]
                    parts = [part if part.ndim == 3 else part[:, None] for part in parts]
                    spread = patches.spread(parts, rows=name == "received")
                    for look, x in zip(looks, spread, strict=True):
                        getattr(look, name)[index] = x if name == "cls" else x[0]
        if not (record.projected or record.hidden) or (needs.soft and not patches.direct):
            return looks
        patches.check_direct()
        for (part, index), x in record.projected.items():
            for look, rows in zip(looks, x, strict=True):
                where = look.keys if part == "k_proj" else look.queries
                where[index] = rows.view(rows.shape[0], stack.heads, -1)
        if stack.features:
            hidden = torch.cat([record.hidden[index] for index in stack.features], -1)
            for look, rows in zip(looks, hidden, strict=True):
                look.features = rows
        return looks


@dataclass(eq=False)
class _Restore:
    """A handle: gives a module its own method back."""

    module: torch.nn.Module
    name: str

    def remove(self) -> None:
        """As a hook's."""
        self.module.__dict__.pop(self.name, None)


def _heads(features: Any, tokens: list[int]) -> list[Tensor]:
    """The row of each image's first token."""
    parts = [features] if isinstance(features, torch.Tensor) else features
    rows = torch.cat([part.detach().reshape(-1, part.shape[-1]) for part in parts])
    starts = torch.tensor([0, *tokens[:-1]]).cumsum(0)
    return list(rows[starts.to(rows.device)])


def _attention(layer: Any) -> torch.nn.Module | None:
    found = [getattr(layer, name, None) for name in _NAMES]
    found = [one for one in found if isinstance(one, torch.nn.Module)]
    return found[0] if len(found) == 1 else None


def _from_start(layers: tuple[float, ...], depth: int) -> list[int]:
    """Layers counted from 0; floats are shares of the depth."""
    whole = [min(round(x * depth), depth - 1) if isinstance(x, float) else int(x) for x in layers]
    for layer in whole:
        if not -depth <= layer < depth:
            raise PruningError(f"the schedule asks for layer {layer} of a vision tower that has {depth}")
    return [layer % depth for layer in whole]
