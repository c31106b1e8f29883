"""Float64 that stays float64.

The library computes angles, norms, softmax and routers in float32 even in a float64 model. Two computations of one
thing differ in their last bit as soon as a product has another shape, and how is the CPU's affair; rounding to float32
makes of that, now and then, a difference in the seventh digit. Tests in float64 would then depend on the CPU, or would
have to be as lenient as those in float32. So their models are widened: casts to float32 leave float64 as it is.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


class _NoNarrowing(TorchFunctionMode):
    """Of float64, whatever asks for float32 gets float64."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], torch.Tensor) and args[0].dtype == torch.float64:
            if func is torch.Tensor.float:
                return args[0]
            args = tuple(torch.float64 if x is torch.float32 else x for x in args)
            kwargs = {name: torch.float64 if x is torch.float32 else x for name, x in kwargs.items()}
        if (
            func is torch.zeros and kwargs.get("dtype") is torch.float32
        ):  # a router's place for what it will say
            kwargs["dtype"] = torch.float64
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
    """Let the layers, norms, rotary angles and the loss of a float64 model compute in float64 throughout."""
    for name, module in list(model.named_modules()):
        last = name.rpartition(".")[2]
        if "rotary" in last:
            for buffer in module.buffers():
                buffer.data = buffer.to(torch.complex128 if buffer.is_complex() else torch.float64)
        if last.isdigit():  # some releases make routers of float32 whatever the model's type
            for tensor in (*module.parameters(), *module.buffers()):
                if tensor.dtype == torch.float32:
                    tensor.data = tensor.data.double()
        if last.isdigit() or "rotary" in last or "norm" in last:
            module.__class__ = _wide(type(module))
    loss = model.loss_function

    @functools.wraps(loss)
    def wide_loss(*args: Any, **kwargs: Any) -> Any:
        with _NoNarrowing():
            return loss(*args, **kwargs)

    model.loss_function = wide_loss


class Narrow(TorchDispatchMode):
    """Collects in ``found`` the operations whose results are less than float64; conversions and views aside."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        results = [
            x for x in (out if isinstance(out, list | tuple) else [out]) if isinstance(x, torch.Tensor)
        ]
        moves = func.is_view or func._opname in ("_to_copy", "clone")
        if not moves and any(x.is_floating_point() and x.dtype != torch.float64 for x in results):
            self.found.add(func._opname)
        return out
