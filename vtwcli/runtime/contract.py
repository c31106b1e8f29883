"""What the runtime takes for granted about a model: the names of arguments, the attention, the release."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import transformers

TESTED = ("4.57.6", "5.0.0", "5.10.4", "5.20.0", "5.23.0", "5.24.0")
"""Releases of transformers that the runtime was tested with."""

CACHE_NAMES = ("cache", "past_key_values", "past_key_value")  # newest first
CALL = "pruning_call"  # carries the state of one forward pass from the text model to its layers
POSITIONS = "position_embeddings"  # what the names of rotary embeddings begin with
LENT = "shared_kv_states"  # keys and values that layers lend to later ones, by the kind of layer
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
# what layers are given that has, or may have, a row for each token, and is understood or does not matter
_PER_TOKEN = ("hidden_states", "position_ids", "attention_mask", "cache_position", *CACHE_NAMES)


class PruningError(ValueError):
    """The schedule cannot be executed exactly here; the message says why and what to do."""


def strange(what: str) -> PruningError:
    """The model does not keep the contract that the hooks rely on; ``what`` says in which point."""
    return PruningError(
        f"{what}; its layers are not built like those that this runtime knows. transformers is "
        f"{transformers.__version__}: take a release it was tested with ({', '.join(TESTED)}), or run the model "
        "unpruned"
    )


def cache_argument(module: torch.nn.Module, *more: str) -> str:
    """The name by which a module takes the cache.

    Raises:
        PruningError: it takes none or several, or not what ``more`` names.
    """
    names = inspect.signature(module.forward).parameters
    found = [name for name in CACHE_NAMES if name in names]
    if len(found) != 1 or not names.keys() >= set(more):
        raise strange(
            f"{type(module).__name__} takes {', '.join(names)}, not one of {', '.join((*CACHE_NAMES, *more))}"
            if not found
            else f"{type(module).__name__} takes {', '.join(names)}, where {', '.join((found[0], *more))} is known"
        )
    return found[0]


def given_cache(given: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a call, whatever its name there; None if there is none.

    Raises:
        PruningError: there are several, or one that goes by another name.
    """
    caches = {id(value): value for name in CACHE_NAMES if (value := given.get(name)) is not None}
    for name, value in given.items():
        if name not in CACHE_NAMES and hasattr(value, "update") and hasattr(value, "get_seq_length"):
            raise strange(f"a cache is given by the name {name}")
    if len(caches) > 1:
        raise strange(f"two caches are given, as {' and '.join(n for n in CACHE_NAMES if given.get(n))}")
    return next(iter(caches.values()), None)


def borrows(attention: Any) -> bool:
    """Whether an attention has no keys of its own and reads those of a layer before it."""
    return bool(getattr(attention, "is_kv_shared_layer", False))


def row_arguments(layer: torch.nn.Module, given: Mapping[str, Any], shape: Sequence[int]) -> tuple[str, ...]:
    """The arguments [B, S, ...] that a layer names itself and that have a row for each token, beside those that all
    layers have.

    Args:
        given: what it is called with.
        shape: (B, S).
    """
    return tuple(
        name
        for name in inspect.signature(type(layer).forward).parameters
        if name not in _PER_TOKEN
        and not name.startswith(POSITIONS)
        and isinstance(given.get(name), torch.Tensor)
        and given[name].ndim in (2, 3)
        and tuple(given[name].shape[:2]) == tuple(shape)
    )


def check_arguments(given: Mapping[str, Any], lengths: set[int], by_row: Iterable[str] = ()) -> None:
    """Refuse a layer's argument that is not known and has a size for each token or entry, ``lengths``.

    Args:
        by_row: names of those that are gathered, see ``row_arguments``.
    """
    for name, value in given.items():
        if name in _PER_TOKEN or name.startswith(POSITIONS) or name in by_row:
            continue
        for part in value if isinstance(value, tuple | list) else (value,):
            if isinstance(part, torch.Tensor) and lengths.intersection(part.shape):
                raise strange(f"the layers get {name}, with a row for each token")


def base_of(model: torch.nn.Module, text_model: str) -> torch.nn.Module:
    """The module that receives ``input_ids`` together with the vision inputs: the nearest around the text model that
    takes these, else its parent.

    Args:
        text_model: path of the text model.
    """
    path = text_model.split(".")[:-1]
    for end in range(len(path), -1, -1):
        module = model.get_submodule(".".join(path[:end]))
        if any(name.startswith(_VISION_INPUTS) for name in inspect.signature(module.forward).parameters):
            return module
    return model.get_submodule(".".join(path))


def scaled_from(attention: Any) -> int | None:
    """The row from which on an attention scales its queries by their row's number, as Llama 4's does in layers without
    rotary embeddings; None: it never does."""
    if getattr(attention, "use_rope", True) or not getattr(attention, "attn_temperature_tuning", False):
        return None
    return int(attention.floor_scale) - 1


def check_scaling(attention: Any, index: torch.Tensor, query: torch.Tensor, past: int) -> None:
    """Refuse rows whose queries would be scaled by other numbers than their tokens'.

    Args:
        attention: of the layer.
        index: token of each row, [B, T].
        query: which rows are a token's, [B, T].
        past: tokens seen before.

    Raises:
        PruningError: there is such a row.
    """
    first = scaled_from(attention)
    if first is None or past + int(index.max()) < first:
        return
    step, place = first + 1, torch.arange(index.shape[1], device=index.device)
    if bool(((index + past + 1) // step != (place + past + 1) // step)[query].any()):
        raise PruningError(
            f"this model scales queries by their row's number from {step} tokens on, which shorter prompts change; "
            "prune shorter prompts"
        )


def check_values(attention: Any, values: torch.Tensor) -> None:
    """Refuse cache entries [B, H_kv, T, D] that are not the values which the attention's weights meet, such as those
    of multi-head latent attention.

    Raises:
        PruningError: the entries are others.
    """
    wide = getattr(getattr(attention, "o_proj", None), "in_features", None)
    groups = getattr(attention, "num_key_value_groups", None)
    if wide is not None and groups is not None and values.shape[1] * groups * values.shape[3] != wide:
        raise PruningError(
            "the cache of this model holds compressed keys and values, so measured scores and mutes that leave the "
            "softmax as it is have nothing to work on; use withdraw, freeze, and keep by uniform or random"
        )


def arguments(module: torch.nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name."""
    names = [n for n in inspect.signature(module.forward).parameters if n != "self"] if args else []
    return {**dict(zip(names, args, strict=False)), **kwargs}


def attention_kind(attention: Any) -> str:
    """The attention implementation of a module."""
    kind = getattr(getattr(attention, "config", None), "_attn_implementation", None) or "eager"
    if "flex" in kind or "paged" in kind:
        raise PruningError(f"{kind} is not supported under a schedule; use sdpa, eager or flash attention")
    return kind


def brings_vision(given: Mapping[str, Any]) -> bool:
    """Whether the arguments of a call bring vision inputs."""
    return any(name.startswith(_VISION_INPUTS) and is_given(value) for name, value in given.items())


def is_given(value: Any) -> bool:
    """Whether an input was given; a mapping, whether any of its values was."""
    if isinstance(value, Mapping):
        return any(v is not None for v in value.values())
    return value is not None
