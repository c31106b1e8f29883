"""A model larger than the memory: its layers are read from the safetensors files one at a time.

All samples go through a layer before the next one is looked at, so each weight is read once. One thread reads the
next layer while this one computes. Weights are read with plain reads into two buffers that all layers share:
memory-mapped files fault cold pages slowly and count as resident.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vtwcli.errors import NotFoundError, UsageError
from vtwcli.models.checkpoint import StoredTensor
from vtwcli.models.layers import Capture, capture, check_attention, read_out
from vtwcli.models.loading import LoadedModel

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
        UsageError: weights that are not stored as the model holds them (quantized, or fused experts).
    """

    together = True

    def __init__(self, loaded: LoadedModel) -> None:
        if loaded.checkpoint is None:
            raise UsageError(f"{loaded.name} did not come from files, so it cannot be streamed")
        self.model, self.family, self.device = loaded.model, loaded.family, loaded.device
        self.eager = check_attention(self.model, self.family)
        self.depth = len(loaded.layers)
        self.seconds = dict.fromkeys(("encoding", "reading", "waiting", "head"), 0.0)
        self._empty: dict[str, Tensor] = dict(self.model.state_dict(keep_vars=True))
        self._stored = _stored(loaded, self._empty)
        for name, buffer in list(self.model.named_buffers()):
            if not buffer.is_meta:
                _assign(self.model, name, buffer.to(self.device))

    @torch.no_grad()
    def captures(self, batches: Sequence[Mapping[str, Tensor]]) -> list[Capture]:
        """See ``LayerSource``; the vision side and the embeddings are dropped again."""
        began = time.perf_counter()
        apart = (f"{self.family.text_model}.layers.", *self._head_prefixes)
        names = [name for name in self._empty if not name.startswith(apart)]
        with self._filled(names):
            found = [capture(self.model, self.family, batch) for batch in batches]
        self.seconds["encoding"] += time.perf_counter() - began
        return found

    def layers(self) -> Iterator[nn.Module]:
        """See ``LayerSource``; a layer is emptied when the next one is asked for."""
        prefixes = [f"{self.family.text_model}.layers.{d}." for d in range(self.depth)]
        names = [[name for name in self._empty if name.startswith(prefix)] for prefix in prefixes]
        modules: Any = self.model.get_submodule(self.family.text_model)
        slots = _Slots(max(sum(map(self._room, layer)) for layer in names), self.device)

        def read(d: int) -> list[Tensor]:
            began = time.perf_counter()
            tensors = slots.fill(d % 2, [(self._stored[name], self._empty[name]) for name in names[d]])
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
                    _assign(self.model, name, tensor)
                try:
                    yield modules.layers[d]
                finally:
                    self._drop(names[d])

    @contextmanager
    def head(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """See ``LayerSource``; norm and head are dropped at the end."""
        began = time.perf_counter()
        with self._filled([name for name in self._empty if name.startswith(self._head_prefixes)]):
            self.seconds["head"] += time.perf_counter() - began
            yield lambda hidden: read_out(self.model, self.family, hidden)

    @property
    def _head_prefixes(self) -> tuple[str, str]:
        return f"{self.family.text_model}.norm.", f"{self.family.head}."

    def _room(self, name: str) -> int:
        """Bytes that a tensor takes in a buffer."""
        empty = self._empty[name]
        return -(-empty.numel() * empty.element_size() // _ALIGNMENT) * _ALIGNMENT

    @contextmanager
    def _filled(self, names: Sequence[str]) -> Iterator[None]:
        """Tensors that are read, each into memory of its own, and dropped at the end."""
        try:
            for name in names:
                stored, empty = self._stored[name], self._empty[name]
                raw = torch.empty(stored.nbytes, dtype=torch.uint8)
                _read(stored, raw)
                tensor = raw.view(stored.dtype).view(stored.shape)
                _assign(self.model, name, tensor.to(self.device, empty.dtype))
            yield
        finally:
            self._drop(names)

    def _drop(self, names: Sequence[str]) -> None:
        for name in names:
            _assign(self.model, name, self._empty[name])


class _Slots:
    """Two buffers on the device that take turns, so that one is filled while the other is in use.

    On a GPU the files are read into pinned memory first and copied by a stream of its own.
    """

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.device = device
        self.slots = [torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in range(2)]
        self.cuda = device.type == "cuda"
        self.staging = torch.empty(nbytes, dtype=torch.uint8, pin_memory=self.cuda) if device.type != "cpu" else None
        self.stream = torch.cuda.Stream(device) if self.cuda else None
        self.scratch = torch.empty(0, dtype=torch.uint8)

    def fill(self, slot: int, tensors: Sequence[tuple[StoredTensor, Tensor]]) -> list[Tensor]:
        """Read stored tensors into a buffer, in the types of the empty ones; runs in the reading thread."""
        target, place = self.slots[slot], 0
        memory = target if self.staging is None else self.staging
        views = []
        for stored, empty in tensors:
            end = place + empty.numel() * empty.element_size()
            if stored.dtype == empty.dtype:
                _read(stored, memory[place:end])
            else:
                if len(self.scratch) < stored.nbytes:
                    self.scratch = torch.empty(stored.nbytes, dtype=torch.uint8)
                raw = self.scratch[: stored.nbytes]
                _read(stored, raw)
                memory[place:end].view(empty.dtype).copy_(raw.view(stored.dtype))
            views.append(target[place:end].view(empty.dtype).view(empty.shape))
            place = -(-end // _ALIGNMENT) * _ALIGNMENT
        if self.staging is not None:
            with torch.cuda.stream(self.stream):
                target[:place].copy_(self.staging[:place], non_blocking=self.cuda)
            if self.stream is not None:
                self.stream.synchronize()
        return views

    def wait(self) -> None:
        """Return when the device has computed all it was given."""
        if self.cuda:
            torch.cuda.current_stream(self.device).synchronize()


def _read(stored: StoredTensor, into: Tensor) -> None:
    """Read a tensor's bytes into a CPU byte tensor of that length.

    Raises:
        NotFoundError: the file is gone or ends early.
    """
    view = memoryview(into.numpy())
    try:
        with stored.file.open("rb", buffering=0) as stream:
            stream.seek(stored.start)
            while view:
                count = stream.readinto(view)
                if not count:
                    raise NotFoundError(f"weight file {stored.file} ends within {stored.key!r}")
                view = view[count:]
    except OSError as error:
        raise NotFoundError(f"weight file {stored.file} cannot be read: {error.strerror}") from error


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a tensor in the place of a parameter or buffer."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf in module._parameters:
        is_parameter = isinstance(tensor, nn.Parameter)
        module._parameters[leaf] = tensor if is_parameter else nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[leaf] = tensor


def _stored(loaded: LoadedModel, wanted: Mapping[str, Tensor]) -> dict[str, StoredTensor]:
    """The stored tensor for each name of the model's state; a tied name takes that of the one it is tied to."""
    checkpoint = loaded.checkpoint
    assert checkpoint is not None
    if getattr(loaded.config, "quantization_config", None) is not None:
        raise UsageError(f"{loaded.name} is quantized; its layers cannot be streamed", "stream the original model")
    stored, ties = checkpoint.key_map, dict(loaded.model.all_tied_weights_keys)
    ties |= {source: target for target, source in ties.items()}
    found = {name: stored.get(name) or stored.get(ties.get(name, "")) for name in wanted}
    missing = [name for name, tensor in found.items() if tensor is None]
    if missing:
        raise UsageError(
            f"{loaded.name} cannot be streamed: {missing[0]!r} and {len(missing) - 1} more are not stored as the "
            "model holds them",
            "leave out --stream",
        )
    return {name: tensor for name, tensor in found.items() if tensor is not None}
