"""Puts stored values into the tensors of a model that was built without memory for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vtwcli.models.checkpoint import Checkpoint
from vtwcli.models.mapping import Conversion
from vtwcli.models.packed import Weight

Origin = Weight | Conversion
"""Where a tensor of a model comes from."""


class Reader:
    """Tensors of a model's state as they are stored, read once each."""

    def __init__(self, origins: Mapping[str, Origin]) -> None:
        self.origins = origins
        self.made: dict[str, Tensor] = {}  # what conversions gave beyond the tensor they were asked for

    def read(self, name: str, tensor: Tensor) -> None:
        """Give a CPU tensor its stored values, in its own type."""
        origin = self.origins[name]
        if isinstance(origin, Conversion):
            if name not in self.made:
                self.made |= origin.convert([source.read() for source in origin.sources])
            tensor.copy_(self.made.pop(name))
        else:
            origin.fill(tensor)


def assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a tensor in the place of a parameter or buffer."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf in module._parameters:
        if not isinstance(tensor, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=False)
        module._parameters[leaf] = tensor
    else:
        module._buffers[leaf] = tensor


def origins_of(model: Any, checkpoint: Checkpoint) -> dict[str, Origin]:
    """Where each tensor of the model's state comes from; a tied one from that which it is tied to.

    What the library itself may leave out of a checkpoint is left out here.
    """
    quantization = checkpoint.quantization
    if (
        quantization is not None and quantization.activations
    ):  # the skeleton may hold the scales of its layers' inputs
        stored, conversions = checkpoint.origins_in(model)
    else:
        stored, conversions = checkpoint.key_map, checkpoint.conversions
    known: dict[str, Origin] = {**stored, **conversions}
    ties = dict(model.all_tied_weights_keys)
    ties |= {source: target for target, source in ties.items()}
    found = {
        name: known.get(name) or known.get(ties.get(name, "")) for name in model.state_dict(keep_vars=True)
    }
    return {name: origin for name, origin in found.items() if origin is not None}


@torch.no_grad()
def fill(model: Any, checkpoint: Checkpoint, device: torch.device) -> None:
    """Read all weights of a checkpoint's skeleton, packed ones unpacked into the skeleton's types, onto the device.

    Raises:
        NotFoundError: a weight cannot be read.
    """
    origins = origins_of(model, checkpoint)
    reader = Reader(origins)
    empty: dict[str, Tensor] = dict(model.state_dict(keep_vars=True))
    for name in origins:
        tensor = torch.empty_like(empty[name], device="cpu")
        reader.read(name, tensor)
        assign(model, name, tensor.to(device))
    for name, buffer in list(model.named_buffers()):
        if buffer.device != device:
            assign(model, name, buffer.to(device))
    model.tie_weights()
