"""A stock model seen as a sequence of decoder layers.

``capture`` records what a model hands its text layers without running them; a ``LayerSource`` gives the layers
one after the other and, behind them, the head. The layers themselves are the library's own, never rewritten.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vtwcli.errors import NotFoundError, UsageError, VtwError, first_line
from vtwcli.models.families import Family, placeholder_ids


@dataclass(frozen=True)
class Capture:
    """What a model hands its text layers for one batch of B rows and S positions.

    Attributes:
        hidden: the embedding stream, text and visual tokens merged, [B, S, D].
        added: what the model itself adds before layer d > 0, {d: [B, S, D]}; empty for most families, the visual
            features of DeepStack for others.
        kwargs: the keyword arguments of each layer, without hidden states and cache.
        by_row: names of keyword arguments that have a row for each position, [B, S, ...].
        visual: which positions are visual tokens, bool [B, S].
        attended: which positions are not padding, bool [B, S].
    """

    hidden: Tensor
    added: dict[int, Tensor]
    kwargs: list[dict[str, Any]]
    visual: Tensor
    attended: Tensor
    by_row: frozenset[str] = frozenset()


def cache_argument(module: nn.Module) -> str:
    """The name by which a layer, or the text model, takes the cache; it differs between releases of transformers.

    Raises:
        VtwError: it takes none that is known.
    """
    from vtwcli.runtime import contract

    try:
        return contract.cache_argument(module)
    except contract.PruningError as error:
        raise VtwError(str(error)) from error


class LayerSource(Protocol):
    """Where the sweep gets its layers from.

    Attributes:
        family: the row of the family table.
        depth: number of decoder layers L.
        eager: whether attention takes additive masks only.
        together: True if every pass over the layers is dear and must carry all samples at once.
    """

    family: Family
    depth: int
    eager: bool
    together: bool

    def captures(self, batches: Sequence[Mapping[str, Tensor]]) -> list[Capture]:
        """What the model hands its layers for each batch of model inputs."""

    def layers(self) -> Iterator[nn.Module]:
        """The decoder layers in order, each ready to run until the next one is asked for."""

    def head(self) -> AbstractContextManager[Callable[[Tensor], Tensor]]:
        """A function from the last layer's output [N, D] to logits [N, V]: final norm, head and what follows."""


@contextmanager
def replaced(module: nn.Module, forward: Callable) -> Iterator[None]:
    """Give one module another ``forward`` for a while, keeping a forward that was already set on the instance."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


class _Reached(Exception):
    """The forward pass came to the final norm; nothing behind it is wanted."""


@torch.no_grad()
def capture(model: nn.Module, family: Family, inputs: Mapping[str, Tensor]) -> Capture:
    """Run the stock forward up to its layers and record what it hands them.

    Every text layer is replaced by a stub that returns zeros, so that the input a later stub sees is exactly
    what the model itself adds between layers.

    Args:
        model: the top-level model; its text layers may be on the meta device.
        inputs: model inputs with ``input_ids`` [B, S], as the processor makes them.

    Raises:
        NotFoundError: the model fails on its inputs, as with a config that loads but cannot be computed with.
    """
    from vtwcli.runtime.contract import row_arguments

    text_model: Any = model.get_submodule(family.text_model)
    streams: list[Tensor] = []
    kwargs: list[dict[str, Any]] = []
    by_row: set[str] = set()

    def stub(layer: nn.Module) -> Callable:
        names = [name for name in inspect.signature(type(layer).forward).parameters if name != "self"]
        name = cache_argument(layer)

        def forward(*args: Any, **given: Any) -> Tensor:
            given |= dict(zip(names, args, strict=False))
            hidden = given.pop("hidden_states")
            given.pop(name, None)
            by_row.update(row_arguments(layer, given, hidden.shape[:2]))
            streams.append(hidden)
            kwargs.append(given)
            return torch.zeros_like(hidden)

        return forward

    def norm(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        streams.append(hidden)
        raise _Reached

    with ExitStack() as stack:
        for layer in text_model.layers:
            stack.enter_context(replaced(layer, stub(layer)))
        stack.enter_context(replaced(text_model.norm, norm))
        stack.enter_context(suppress(_Reached))
        try:
            model(**inputs, use_cache=False)
        except (VtwError, _Reached):
            raise
        except Exception as error:  # there is no telling what unusual settings make transformers raise
            raise NotFoundError(
                f"the model {getattr(model, 'name_or_path', '')!r} fails on its inputs: {type(error).__name__}: "
                f"{first_line(error)}",
                "its config.json and its processor's files do not go together",
            ) from error
    _check_scaling(text_model.layers, streams[0].shape[1])
    depth = len(text_model.layers)
    if len(streams) != depth + 1:
        raise VtwError(f"the model called {len(streams) - 1} of its {depth} text layers")
    input_ids = inputs["input_ids"]
    ids = torch.tensor(placeholder_ids(family, model.config), device=input_ids.device)
    given = inputs.get("attention_mask")
    attended = torch.ones_like(input_ids, dtype=torch.bool) if given is None else given.bool()
    home = streams[0].device
    attended = attended.to(home)
    visual = torch.isin(input_ids, ids).to(home) & attended
    behind = streams.pop().to(home)
    if bool(behind[attended & ~visual].any()):
        raise VtwError("the model adds something to text tokens behind its last layer")
    return Capture(
        hidden=streams[0],
        added={d: x.to(home) for d, x in enumerate(streams) if d and bool(x.any())},
        kwargs=kwargs,
        visual=visual,
        attended=attended,
        by_row=frozenset(by_row),
    )


@cache
def _output_class() -> type:
    """What a text model returns; whatever else is asked of it is None."""
    from transformers.modeling_outputs import MoeModelOutputWithPast

    class Output(MoeModelOutputWithPast):
        def __getattr__(self, name: str) -> Any:
            if name.startswith("_"):
                raise AttributeError(name)
            return None

    return Output


def _check_scaling(layers: Sequence[Any], length: int) -> None:
    """Refuse samples of a ``length`` from which on queries are scaled by their row's number: of rows that run apart
    from the others that is another."""
    from vtwcli.runtime.contract import scaled_from

    found = [at for layer in layers if (at := scaled_from(getattr(layer, "self_attn", None))) is not None]
    if found and length > min(found):
        raise UsageError(
            f"a sample of {length:,} tokens: this model scales queries by their row's number from "
            f"{min(found) + 1:,} tokens on, which the sweep does not",
            "give fewer or smaller images",
        )


@torch.no_grad()
def read_out(model: nn.Module, family: Family, hidden: Tensor) -> Tensor:
    """Logits [N, V] for the last layer's output ``hidden`` [N, D].

    The stock top-level forward runs with its text model cut down to the final norm, so that scaling or
    soft-capping behind the head is the library's own.
    """
    text_model: Any = model.get_submodule(family.text_model)
    normed = text_model.norm(hidden[None])

    def forward(*_: Any, **__: Any) -> Any:
        return _output_class()(last_hidden_state=normed)

    count, base = len(hidden), model.get_submodule(family.text_model.rpartition(".")[0])
    # some embed text for the sake of the layers' inputs, which nobody needs here
    whole = "per_layer_inputs" in inspect.signature(base.forward).parameters
    with replaced(base if whole else text_model, forward):
        out = model(
            inputs_embeds=hidden[None],
            attention_mask=torch.ones(1, count, dtype=torch.long, device=hidden.device),
            position_ids=torch.arange(count, device=hidden.device)[None],
            use_cache=False,
        )
    return out.logits[0]


class Resident:
    """The layers of a model that is loaded whole, on one device or spread over several.

    Args:
        model: the top-level stock model in evaluation mode, with sdpa or eager attention.
        family: its row of the family table.
    """

    together = False

    def __init__(self, model: nn.Module, family: Family) -> None:
        self.model, self.family = model, family
        self.eager = check_attention(model, family)
        layers: Any = model.get_submodule(family.text_model).layers
        self._layers = layers
        self.depth = len(layers)

    def captures(self, batches: Sequence[Mapping[str, Tensor]]) -> list[Capture]:
        """See ``LayerSource``."""
        return [capture(self.model, self.family, batch) for batch in batches]

    def layers(self) -> Iterator[nn.Module]:
        """See ``LayerSource``."""
        return iter(self._layers)

    def head(self) -> AbstractContextManager[Callable[[Tensor], Tensor]]:
        """See ``LayerSource``."""
        return nullcontext(lambda hidden: read_out(self.model, self.family, hidden))


def check_attention(model: nn.Module, family: Family) -> bool:
    """Whether the text model's attention is eager, which takes additive masks, rather than sdpa.

    Raises:
        UsageError: another implementation, or a model in training mode (dropout would be in every number).
    """
    name = _attention_of(model, family)
    if not takes_masks(model, family):
        raise UsageError(
            f"{name} attention takes no explicit masks", "load the model with sdpa or eager attention"
        )
    if model.training:
        raise UsageError("the model is in training mode", "call model.eval() first")
    return bool(name == "eager")


def takes_masks(model: nn.Module, family: Family) -> bool:
    """Whether the text model's attention takes the masks that a sweep hands it."""
    return _attention_of(model, family) in ("sdpa", "eager")


def _attention_of(model: nn.Module, family: Family) -> str:
    text_model: Any = model.get_submodule(family.text_model)
    return str(text_model.config._attn_implementation)
