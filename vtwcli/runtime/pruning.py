"""Runs a visual token schedule on a stock transformers model, by hooks.

The form of a schedule is told in ``words``. A *layout* tells where a family keeps its parts: ``text_model`` (path of
the text model; its parent receives ``input_ids``), ``placeholder_ids`` (of visual tokens in ``input_ids``) and
``first_withdrawal`` (first layer at which visual tokens may leave).

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
touch the muted entries. ``freeze`` saves all of its visual rows but their keys and values; with flash attention,
whose causal alignment needs a row for each entry, nothing: rows are computed and put back.

Static caches. Prompts run eagerly; the steps behind them are the same for all values, so that torch.compile makes one
graph of them, see ``static``. Schedules that decide by the sample are refused there.

Limits. Flash attention gets two-dimensional masks; that path was tested with plain stand-ins for its kernels, not on
a GPU. Under gradient checkpointing, actions that look inside attention are refused. When ``generate`` runs with
``use_cache=False`` every step is a prompt of its own, so measured scores come from the newest token's row; with
chunked prefill, from the last row of the chunk. Each prompt on a live cache decides for its own visual tokens.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from vtwcli.runtime.asking import not_compiled
from vtwcli.runtime.attention import guard_hooks, leave_attention
from vtwcli.runtime.cache import PrunedLayer, cache_layer
from vtwcli.runtime.call import Call
from vtwcli.runtime.contract import (
    CACHE_NAMES,
    CALL,
    LENT,
    PruningError,
    arguments,
    attention_kind,
    base_of,
    cache_argument,
    check_arguments,
    check_scaling,
    given_cache,
    row_arguments,
    strange,
)
from vtwcli.runtime.entry import check_labels, visual_tokens
from vtwcli.runtime.freeze import leave_layer, part
from vtwcli.runtime.front import shorten, tapped
from vtwcli.runtime.lent import Loan, borrowed, check_plan, lenders, remember
from vtwcli.runtime.masks import not_padding, split_sinks, sunk
from vtwcli.runtime.places import places
from vtwcli.runtime.plan import Plan
from vtwcli.runtime.positions import Turned, renumber
from vtwcli.runtime.ranking import before_layer
from vtwcli.runtime.rows import Rows, take, take_positions
from vtwcli.runtime.scores import guided
from vtwcli.runtime.static import PromptLayer, StaticPrunedLayer, decides, greet, is_static, settle, stepped
from vtwcli.runtime.tap import Tap
from vtwcli.runtime.trace import Trace, traced
from vtwcli.runtime.trimming import trim


class Pruning:
    """A schedule at work on a model; made by ``apply`` or ``pruned``.

    Attributes:
        given: of the next prompts, [B, S]: the scores of a guide, where the schedule says ``guided``; those of text
            do not matter.

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
        self.plan = Plan(schedule, len(layers), int(layout.get("first_withdrawal", 0)))
        self.given: torch.Tensor | None = None
        self.placeholders = tuple(layout["placeholder_ids"])
        self._norm = getattr(text_model, "norm", None)
        self._calls: dict[int, Call] = {}  # per thread, from the base model's start to the text model's
        self._inside: dict[int, Call] = {}  # per thread, inside the text model
        self._traced: Call | None = None
        self._handles: list[Any] = []
        self._caches: list[str] = []  # by which name each layer takes its cache
        self._lenders: dict[int, int] = {}  # whose keys layers read that have none
        if self.plan.idle:
            return
        base = base_of(model, path)
        guard_hooks()
        self._caches = [cache_argument(layer, "hidden_states", "attention_mask") for layer in layers]
        self._lenders = lenders(layers)
        check_plan(self.plan, self._lenders)
        add = self._handles.append
        self._tower = tapped(self.plan, base, text_model, self._handles)
        add(base.register_forward_pre_hook(self._enter_base, with_kwargs=True))
        add(base.register_forward_hook(self._check_base, with_kwargs=True))
        add(base.register_forward_hook(self._leave_base, with_kwargs=True, always_call=True))
        add(text_model.register_forward_pre_hook(self._enter_text, with_kwargs=True))
        add(text_model.register_forward_hook(self._leave_text, with_kwargs=True))
        if self.plan.renumbers:
            for child, module in text_model.named_children():
                if "rotary_emb" in child:
                    add(module.register_forward_hook(self._turned, with_kwargs=True))
        add(model.register_forward_pre_hook(self._check_labels, with_kwargs=True))
        for index, layer in enumerate(layers):
            add(layer.register_forward_pre_hook(partial(self._enter_layer, index), with_kwargs=True))
            if self.plan.frozen(index):
                # before other hooks, which may record what comes out
                add(layer.register_forward_hook(leave_layer, with_kwargs=True, prepend=True))
            if self.plan.may_probe(index) or self.plan.mutes_in(index) or self.plan.trimmed(index):
                attention = getattr(layer, "self_attn", None)
                try:
                    if attention is None:
                        raise strange(f"layer {index} has no self_attn")
                    cache_argument(attention, "hidden_states", "attention_mask")
                except PruningError:
                    self.remove()
                    raise
                add(attention.register_forward_hook(leave_attention, with_kwargs=True))

    @property
    def trace(self) -> Trace | None:
        """What happened to the last prompt, in whichever thread it ran; None before the first, and if the schedule
        never does anything."""
        return None if self._traced is None else traced(self._traced)

    def remove(self) -> None:
        """Take every hook away."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    # ------------------------------------------------------------------ around the text model

    @decides
    def _check_labels(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        check_labels(self.plan, arguments(module, args, kwargs), self.placeholders)

    @decides
    def _enter_base(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = arguments(module, args, kwargs)
        visual = visual_tokens(given, self.placeholders)
        ids, mask = given.get("input_ids"), given.get("attention_mask")
        if ids is None:
            return
        around = None
        if visual is not None and self.plan.looks_around:
            around = places(visual, given, getattr(module, "config", None))
        real = not_padding(mask, ids, is_static(given_cache(given)))
        call = Call(self.plan, visual, real, tuple(ids.shape), around)
        if visual is not None and self.plan.guided:
            call.scores |= dict.fromkeys(self.plan.guided, guided(self.given, visual))
        self._calls[threading.get_ident()] = call

    @decides
    def _check_base(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if threading.get_ident() in self._calls:
            raise strange("the model did not call its text model")

    @decides
    def _leave_base(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        self._calls.pop(threading.get_ident(), None)

    @decides
    def _enter_text(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        call = self._calls.pop(threading.get_ident(), None)
        if call is None:
            raise PruningError("the text model was called on its own; call the whole model under a schedule")
        attention_kind(module)  # refuses what is not supported before masks are made for it
        self._inside[threading.get_ident()] = call
        if self._tower is not None:
            args, kwargs = (), shorten(call, self._tower, arguments(module, args, kwargs))
        if self._lenders and "logits_to_keep" in kwargs:
            kwargs = {**kwargs, "logits_to_keep": 0}  # else borrowing layers may be handed the last rows only
        return args, {**kwargs, CALL: call}

    @not_compiled
    def _turned(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        call = self._inside.get(threading.get_ident())
        if call is not None:
            call.angles.append(Turned.of(module, args, kwargs, output))

    @decides
    def _leave_text(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        call = kwargs[CALL]
        self._inside.pop(threading.get_ident(), None)
        hidden = output[0]
        remember(call, self._lenders.values())
        cache, rows = call.cache, call.finish(self._lenders)
        call.check_rows(self.plan.depth - 1, hidden)
        if call.visual is not None or call.past == 0:
            self._traced = call
        if is_static(cache):
            settle(cache, self.plan)
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

    def _enter_layer(
        self, index: int, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        cache = stepped(args, kwargs, self.plan)
        if cache is None:
            return self._enter_layer_of_call(index, module, args, kwargs)
        layer = cache.layers[index]
        if isinstance(layer, StaticPrunedLayer):
            kwargs = {**kwargs, "attention_mask": layer.mask(kwargs.get("attention_mask"))}
        return args, kwargs

    @not_compiled
    def _enter_layer_of_call(
        self, index: int, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        kwargs = dict(kwargs)
        call: Call | None = kwargs.pop(CALL, None)
        if call is None:
            raise strange(f"layer {index} was called outside of its model under a schedule")
        kwargs = arguments(module, args, kwargs)
        if args and kwargs.get("hidden_states") is not args[0]:
            raise strange("the layers do not get their hidden states first")
        hidden: Any = kwargs.get("hidden_states")
        cache, name = given_cache(kwargs), self._caches[index]
        call.enter(index, hidden)
        for known in CACHE_NAMES:
            kwargs.pop(known, None)
        kwargs[name] = cache
        if index == 0:
            self._greet(cache, call, getattr(module, "self_attn", None))
        elif cache is not call.cache and not call.over:
            raise strange(f"layer {index} gets another cache than layer 0")
        before = call.at.get(index - 1)
        if call.visual is not None and index not in call.at:
            self._ask(index, module, call, before or call.full(hidden.device), kwargs)
        rows = call.rows(index, hidden.device)
        lender = self._lenders.get(index)
        acts = call.visual is not None and (self.plan.acts(index) or index in self._lenders.values())
        acts = acts or lender in call.loans
        probes = call.probes(index)
        held = getattr(cache, "layers", [])[index : index + 1]
        if rows.index is not None or acts or probes or (held and isinstance(held[0], PrunedLayer)):
            self._change(index, module, call, before, rows, acts, probes, kwargs)
            training = getattr(module, "gradient_checkpointing", False) and module.training
            if training and (isinstance(kwargs[name], Tap) or rows.moved is not None or self._lenders):
                raise PruningError(
                    "gradient checkpointing does not go with sinks, freeze, scores, conditions or merging, nor with "
                    "layers that share keys and values"
                )
        if self.plan.by_states(index + 1) and not call.over:
            tap = kwargs.get(name)
            frozen = tap.frozen if isinstance(tap, Tap) else None
            call.entered = kwargs["hidden_states"] if frozen is None else frozen.hidden
        if args:
            args = (kwargs.pop("hidden_states"),)
        return args, kwargs

    def _greet(self, cache: Any, call: Call, attention: Any) -> None:
        """Refuse a cache that was filled otherwise, since what its entries are is not known."""
        call.cache = cache
        if cache is None:
            return
        if not hasattr(cache, "get_seq_length"):
            raise PruningError(
                f"{type(cache).__name__} is not supported under a schedule; use a DynamicCache"
            )
        if is_static(cache):
            if self._lenders:
                raise PruningError("static caches do not go with layers that share keys and values")
            greet(cache, self.plan, attention)
        call.past = int(cache.get_seq_length())
        if call.visual is not None and self.plan.trims:
            cache.vtw_prompt = call.past + call.shape[1]
        if call.past and getattr(cache, "vtw_schedule", None) != self.plan.key:
            raise PruningError("this cache was not filled under this schedule; start with an empty one")
        cache.vtw_schedule = self.plan.key

    def _ask(self, index: int, module: Any, call: Call, rows: Rows, kwargs: dict[str, Any]) -> None:
        """Let a layer tell what it would see of the ``rows`` that enter it, where that decides who stays."""
        given, name = dict(kwargs), self._caches[index]
        held = getattr(kwargs[name], "layers", [])[index : index + 1]
        if self.plan.looks_in(index):
            self._renumber(call, rows, held[0] if held else None, given)
        with torch.no_grad():
            before_layer(call, index, module, name, given, rows, self._norm)

    def _renumber(self, call: Call, rows: Rows, layer: Any, kwargs: dict[str, Any]) -> None:
        """Give the rows of a layer, whose cache's is ``layer``, the positions that they have there."""
        by = call.lowering(rows, layer.columns.gone if isinstance(layer, PrunedLayer) else None)
        if by is not None:
            renumber(kwargs, by, call.angles, call.memo)

    def _change(
        self,
        index: int,
        module: torch.nn.Module,
        call: Call,
        before: Rows | None,
        rows: Rows,
        acts: bool,
        probes: bool,
        kwargs: dict[str, Any],
    ) -> None:
        """Change a layer's arguments into those of the rows that run in it."""
        name, attention = self._caches[index], getattr(module, "self_attn", None)
        hidden, cache, length = kwargs["hidden_states"], kwargs[name], call.shape[1]
        columns, past, skips, given, layer = None, 0, False, kwargs.get("attention_mask"), None
        prefill = call.visual is not None
        split = None
        if prefill and self.plan.frozen(index) and "flash" not in attention_kind(attention):
            split = call.split(rows, hidden.device)
        added = rows if split is None else split.joined
        by_row = row_arguments(module, kwargs, call.shape)
        lender, lent = self._lenders.get(index), None
        if lender is not None:
            past = call.past
            if lender in call.loans:
                columns, *lent = borrowed(call, index, attention, kwargs, lender)
        elif cache is None:
            columns = call.columns(None, added, 0, hidden.device)
        else:
            layer = cache_layer(cache, index)
            past = int(layer.get_seq_length())
            if is_static(cache):
                layer = cache.layers[index] = PromptLayer(layer, call.shape[0], hidden.device, attention)
                given = call.of_chunk(given)
            elif not isinstance(layer, PrunedLayer) and (rows.index is not None or acts):
                layer = cache.layers[index] = PrunedLayer(layer, call.shape[0], hidden.device)
            if isinstance(layer, PrunedLayer):
                if call.visual is not None:
                    layer.recall()
                elif self.plan.text_skips(index, prefill) and index not in self._lenders.values():
                    layer.set_aside(call.memo)
                trim(call, index, layer)
                columns = call.columns(layer.columns, added, past, hidden.device)
                layer.expect(columns, length)
        check_arguments(kwargs, {length, past + length} - {1}, by_row)
        runs = rows if split is None else split.run
        if runs.index is not None:
            check_scaling(attention, runs.index, runs.query, past)
        if columns is not None:
            skips = split is None and prefill and columns.visual and self.plan.text_skips(index, prefill)
            muted = self.plan.masks(index, prefill) if columns.visual else []
            if skips:  # text rows get a pass of their own over text, which spares all others a mask
                muted = [a for a in muted if a.readers != "text"]
            kwargs["attention_mask"] = call.mask(given, runs, columns, past, muted, hidden, attention)
        self._renumber(call, rows, layer, kwargs)
        if rows.index is not None:
            self._gather(call, before, rows, attention, kwargs, by_row)
        frozen = None if split is None else part(module, name, kwargs, split, by_row)
        if split is not None:
            call.rows_at[index] = split.run_at.shape[1]
        sinks = self.plan.sinks(index, prefill) if columns is not None and columns.visual else []
        text, visual = split_sinks(sinks)
        alike = not prefill or split is not None or text == visual
        second = None if alike or skips else text
        base = text if not prefill or split is not None else visual
        due = probes or skips or second is not None
        tap = None
        if base or due or (prefill and self.plan.frozen(index)):
            at = (columns, past, base, second, skips, given, probes, due, frozen)
            call.tap = tap = Tap(cache, call, index, runs, *at)
            kwargs[name] = tap
        if lent is not None:
            keys, values = lent
            kwargs[LENT] = {attention.layer_type: (keys, sunk(values, columns, base))}
            if tap is not None:
                tap.keys, tap.values = keys, values
        if columns is not None and index in self._lenders.values():
            call.loans[index] = Loan(columns, tap)

    def _gather(
        self,
        call: Call,
        before: Rows | None,
        rows: Rows,
        attention: Any,
        kwargs: dict[str, Any],
        by_row: tuple[str, ...],
    ) -> None:
        """Gather the rows of everything that has one per token."""
        if before is not rows:
            slots = rows.index if before is None else call.slots(before, rows)
            kwargs["hidden_states"] = take(kwargs["hidden_states"], slots, 1)
            if rows.moved is not None:
                kwargs["hidden_states"] = rows.moved.put(kwargs["hidden_states"], rows)
        assert rows.index is not None
        take_positions(kwargs, rows.index, call.shape[1], attention, by_row)


def apply(model: torch.nn.Module, schedule: Mapping[str, Any], layout: Mapping[str, Any]) -> Pruning:
    """Run ``schedule`` on every call of ``model`` from now on; ``remove`` undoes it.

    Args:
        schedule: canonical form, see the top of ``words``.
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
