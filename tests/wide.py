"""Float64 that stays float64.

The library computes norms, softmax and routers in float32 even in a float64 model. Two computations of the same thing
then differ in their last bit, as they may on any CPU for products of other shapes, and rounding to float32 makes of it,
now and then, a difference in the seventh digit. Tests in float64 would depend on the CPU they run on, or would have to
be as lenient as those in float32. So their text models are widened: casts to float32 leave float64 as it is.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from vtwcli.models.families import FAMILIES


class _NoNarrowing(TorchFunctionMode):
    """Of float64, whatever asks for float32 gets float64."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], torch.Tensor) and args[0].dtype == torch.float64:
            if func is torch.Tensor.float:
                return args[0]
            args = tuple(torch.float64 if x is torch.float32 else x for x in args)
            kwargs = {name: torch.float64 if x is torch.float32 else x for name, x in kwargs.items()}
        return func(*args, **kwargs)


@functools.cache
def _wide(kind: type) -> type:
    """A subclass by the same name; a class, not a hook or a method of one object, so that it is also there for layers
    that run by themselves, in deep copies and when a checkpointed layer is computed again."""

    @functools.wraps(kind.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _NoNarrowing():
            return kind.forward(self, *args, **kwargs)

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})


def widen(model: Any) -> None:
    """Let the decoder layers, every norm of the text model and the loss of a float64 model compute in float64."""
    text_model = model.get_submodule(FAMILIES[model.config.model_type].text_model)
    norms = [module for name, module in text_model.named_modules() if "norm" in name.rpartition(".")[2]]
    for module in (*text_model.layers, *norms):
        module.__class__ = _wide(type(module))
    loss = model.loss_function

    @functools.wraps(loss)
    def wide_loss(*args: Any, **kwargs: Any) -> Any:
        with _NoNarrowing():
            return loss(*args, **kwargs)

    model.loss_function = wide_loss
