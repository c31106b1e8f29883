"""Stored tensors under the names that the model has for them, without reading any."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from vtwcli.errors import NotFoundError, first_line
from vtwcli.models.config import COUNTS, MANY, SIZES, ConfigFile
from vtwcli.models.packed import Weight
from vtwcli.models.stored import DOWNLOAD_AGAIN

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Conversion:
    """How some of the model's tensors come from stored ones: fused experts, split projections, transposes.

    Attributes:
        sources: the stored tensors, in the order in which ``convert`` takes them.
        convert: tensors read from ``sources`` -> {name in the model: tensor}.
    """

    sources: tuple[Weight, ...]
    convert: Callable[[Sequence[torch.Tensor]], dict[str, torch.Tensor]]


def origins(
    model: PreTrainedModel, tensors: Mapping[str, Weight], name: str, file: ConfigFile
) -> tuple[dict[str, Weight], dict[str, Conversion]]:
    """Where each tensor of a model comes from, as transformers' ``convert_and_load_state_dict_in_model`` has it.

    Args:
        model: with its tensors on the meta device.
        tensors: what is stored, by name on disk.
        name: of the model, for messages.
        file: its config.

    Returns:
        Name in the model -> stored tensor, for those that are stored as the model holds them; and name in the model
        -> how it is computed, for the others that are neither left out nor tied.

    Raises:
        NotFoundError: a parameter of the model has no stored tensor, or one of another shape.
    """
    wanted = model.state_dict()
    mapped, groups, converters = _renamed(model, wanted, tensors)
    conversions: dict[str, Conversion] = {}
    shapes = {target: tensor.shape for target, tensor in mapped.items()}
    for first, group in groups.items():
        converter = next(c for c in converters if group[0][0] in c.source_patterns)
        conversion = Conversion(
            tuple(tensor for _, tensor in group), _converting(converter, model, first, group)
        )
        try:
            made = conversion.convert([torch.empty(t.shape, device="meta") for t in conversion.sources])
        except Exception as error:  # whatever a converter stumbles over in tensors of other shapes
            raise NotFoundError(
                f"the weights of {name!r} do not fit {file}: {first!r}: {first_line(error)}", DOWNLOAD_AGAIN
            ) from error
        conversions |= dict.fromkeys(made, conversion)
        shapes |= {target: tuple(tensor.shape) for target, tensor in made.items()}
    for target, shape in shapes.items():
        if target in wanted and tuple(wanted[target].shape) != shape:
            other = set(wanted[target].shape) - set(shape)
            named = file.named(lambda setting, value: SIZES.search(setting) and value in other)  # noqa: B023 - called at once
            raise NotFoundError(
                f"the weights of {name!r} do not fit {file}: {target!r} is {list(shape)} on disk "
                f"and {list(wanted[target].shape)} in the model{named}",
                "config.json and the weights come from different models",
            )
    missing = _missing(model, shapes)
    if missing:
        number = int(next(iter(re.findall(r"\.(\d+)\.", missing[0])), MANY))
        above = file.named(lambda setting, value: COUNTS.search(setting) and value > number)
        raise NotFoundError(
            f"the weights of {name!r} are incomplete: {len(missing)} of {len(wanted)} tensors of "
            f"{file} are missing, first {missing[0]!r}{above}",
            DOWNLOAD_AGAIN,
        )
    return mapped, conversions


def _renamed(
    model: PreTrainedModel, wanted: dict[str, Any], tensors: Mapping[str, Weight]
) -> tuple[dict[str, Weight], dict[str, list[tuple[str, Weight]]], list[Any]]:
    """Stored tensors by the model's names; those to be converted in groups, with their patterns; the converters.

    A group stands under the first tensor that it gives.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    prefix = model.base_model_prefix
    mapped: dict[str, Weight] = {}
    groups: dict[str, list[tuple[str, Weight]]] = {}
    # in transformers' order, in which it puts fused tensors together and takes the first of several
    for key in sorted(tensors, key=dot_natural_key):
        tensor = tensors[key]
        name, pattern = rename_source_key(key, renamings, converters, prefix, wanted)
        if name not in wanted and key in wanted:
            name, pattern = rename_source_key(key, [], [], prefix, wanted)
        if name not in wanted:
            continue
        if tensor.dtype is None:
            raise NotFoundError(
                f"weight file {tensor.file}: {key!r} is of type {tensor.kind}, which torch does not have"
            )
        if pattern is not None:
            groups.setdefault(name, []).append((pattern, tensor))
        else:
            mapped.setdefault(name, tensor)
    return mapped, groups, converters


def _converting(
    converter: Any, model: PreTrainedModel, name: str, group: list[tuple[str, Weight]]
) -> Callable[[Sequence[torch.Tensor]], dict[str, torch.Tensor]]:
    """The function of a ``Conversion``; converters collect their sources, so each call works on a copy."""

    def convert(tensors: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        own = deepcopy(converter)
        for (pattern, stored), tensor in zip(group, tensors, strict=True):
            own.add_tensor(name, stored.key, pattern, tensor)
        made = own.convert(name, model=model, config=model.config)
        return {target: x[0] if isinstance(x, list) else x for target, x in made.items()}

    return convert


def _missing(model: PreTrainedModel, found: Iterable[str]) -> list[str]:
    """Names of the state dict that are neither stored nor tied to something stored."""
    tied: dict[str, str] = dict(model.all_tied_weights_keys)
    held = set(found)
    for target, source in tied.items():
        if target in held or source in held:
            held |= {target, source}
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    return sorted(
        name for name in model.state_dict() if name not in held and not any(p.search(name) for p in ignored)
    )
