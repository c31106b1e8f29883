"""A model larger than the memory: its layers are read from the safetensors files one at a time.

All samples go through a layer before the next one is looked at, so each weight is read once. One thread reads the
next layer while this one computes. Weights are read with plain reads into two buffers that all layers share:
memory-mapped files fault cold pages slowly and count as resident.
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from vtwcli.errors import UsageError
from vtwcli.models.filling import Origin, Reader, assign, origins_of
from vtwcli.models.loading import LoadedModel
from vtwcli.sweep.layers import Capture, capture, check_attention, read_out

_ALIGNMENT = 64  # bytes; what vector instructions like


class Streamed:
    """The layers of a skeleton, each filled from its checkpoint for as long as it is used.

    Besides one layer and the next, the vision side and the embeddings are resident while ``captures`` runs, and the
    final norm and the head inside ``head``.

    Args:
        loaded: the skeleton of a checkpoint, from ``load(..., weights=False)``, with sdpa or eager attention.

    Attributes:
        seconds: ``encoding``: reading and running the vision side; ``reading``: layers, by the thread; ``waiting``:
            for the thread; ``head``: reading the head.

    Raises:
        UsageError: a model that did not come from files, or weights that only a library unpacks.
    """

    together = True

    def __init__(self, loaded: LoadedModel) -> None:
        self.model, self.family, self.device = loaded.model, loaded.family, loaded.device
        self.eager = check_attention(self.model, self.family)
        self.depth = len(loaded.layers)
        self.seconds = dict.fromkeys(("encoding", "reading", "waiting", "head"), 0.0)
        self._empty: dict[str, Tensor] = dict(self.model.state_dict(keep_vars=True))
        self._origins = _origins(loaded)
        for name, buffer in list(self.model.named_buffers()):
            if not buffer.is_meta:
                assign(self.model, name, buffer.to(self.device))

    @torch.no_grad()
    def captures(self, batches: Sequence[Mapping[str, Tensor]]) -> list[Capture]:
        """See ``LayerSource``; the vision side and the embeddings are dropped again."""
        began = time.perf_counter()
        apart = (f"{self.family.text_model}.layers.", *self._head_prefixes)
        names = [name for name in self._origins if not name.startswith(apart)]
        with self._filled(names):
            found = [capture(self.model, self.family, batch) for batch in batches]
        _trim()
        self.seconds["encoding"] += time.perf_counter() - began
        return found

    def layers(self) -> Iterator[nn.Module]:
        """See ``LayerSource``; a layer is emptied when the next one is asked for."""
        prefixes = [f"{self.family.text_model}.layers.{d}." for d in range(self.depth)]
        names = [[name for name in self._origins if name.startswith(prefix)] for prefix in prefixes]
        empty = [{name: self._empty[name] for name in layer} for layer in names]
        modules: Any = self.model.get_submodule(self.family.text_model)
        slots = _Slots(max(sum(_room(tensor) for tensor in layer.values()) for layer in empty), self.device)

        def read(d: int) -> list[Tensor]:
            began = time.perf_counter()
            tensors = slots.fill(d % 2, empty[d], Reader(self._origins))
            self.seconds["reading"] += time.perf_counter() - began
            return tensors

        with ThreadPoolExecutor(1) as thread:
            coming = thread.submit(read, 0)
            for d in range(self.depth):
                began = time.perf_counter()
                tensors = coming.result()
                self.seconds["waiting"] += time.perf_counter() - began
                if d + 1 < self.depth:
                    slots.wait()  # until nothing computes with the buffer that is overwritten now
                    coming = thread.submit(read, d + 1)
                for name, tensor in zip(names[d], tensors, strict=True):
                    assign(self.model, name, tensor)
                try:
                    yield modules.layers[d]
                finally:
                    self._drop(names[d])
                    _trim()

    @contextmanager
    def head(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """See ``LayerSource``; norm and head are dropped at the end."""
        began = time.perf_counter()
        with self._filled([name for name in self._origins if name.startswith(self._head_prefixes)]):
            self.seconds["head"] += time.perf_counter() - began
            yield lambda hidden: read_out(self.model, self.family, hidden)

    @property
    def _head_prefixes(self) -> tuple[str, str]:
        return f"{self.family.text_model}.norm.", f"{self.family.head}."

    @contextmanager
    def _filled(self, names: Sequence[str]) -> Iterator[None]:
        """Tensors that are read, each into memory of its own, and dropped at the end."""
        stored = Reader(self._origins)
        try:
            for name in names:
                tensor = torch.empty_like(self._empty[name], device="cpu")
                stored.read(name, tensor)
                assign(self.model, name, tensor.to(self.device))
            yield
        finally:
            self._drop(names)

    def _drop(self, names: Sequence[str]) -> None:
        for name in names:
            assign(self.model, name, self._empty[name])


class _Slots:
    """Two buffers on the device that take turns, so that one is filled while the other is in use.

    On a GPU the files are read into pinned memory first and copied by a stream of its own.
    """

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.device = device
        self.slots = [torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in range(2)]
        self.cuda = device.type == "cuda"
        self.staging = (
            torch.empty(nbytes, dtype=torch.uint8, pin_memory=self.cuda) if device.type != "cpu" else None
        )
        self.stream = torch.cuda.Stream(device) if self.cuda else None

    def fill(self, slot: int, empty: Mapping[str, Tensor], stored: Reader) -> list[Tensor]:
        """Read tensors into a buffer, in the shapes and types of the empty ones; runs in the reading thread."""
        target, place = self.slots[slot], 0
        memory = target if self.staging is None else self.staging
        tensors = []
        for name, like in empty.items():
            part = slice(place, place + like.numel() * like.element_size())
            stored.read(name, memory[part].view(like.dtype).view(like.shape))
            tensors.append(target[part].view(like.dtype).view(like.shape))
            place += _room(like)
        if self.staging is not None:
            with torch.cuda.stream(self.stream):
                target[:place].copy_(self.staging[:place], non_blocking=self.cuda)
            if self.stream is not None:
                self.stream.synchronize()
        return tensors

    def wait(self) -> None:
        """Return when the device has computed all it was given."""
        if self.cuda:
            torch.cuda.current_stream(self.device).synchronize()


def _trim() -> None:
    """Give freed memory back to the system: glibc keeps what lies between blocks in use, over time a third of what
    the two buffers take."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


def _room(tensor: Tensor) -> int:
    """Bytes that a tensor takes in a buffer."""
    return -(-tensor.numel() * tensor.element_size() // _ALIGNMENT) * _ALIGNMENT


def _origins(loaded: LoadedModel) -> dict[str, Origin]:
    """Where each tensor of the model's state comes from."""
    checkpoint = loaded.checkpoint
    if checkpoint is None:
        raise UsageError(f"{loaded.name} did not come from files, so it cannot be streamed")
    quantization = checkpoint.quantization
    if quantization is not None and quantization.sealed is not None:
        raise UsageError(
            f"{loaded.name} is quantized, and its layers cannot be streamed: {quantization.sealed}",
            "leave out --stream, or stream the original model",
        )
    return origins_of(loaded.model, checkpoint)
