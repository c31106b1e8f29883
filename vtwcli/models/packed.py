"""Weights that are stored packed, each seen as the one tensor that it stands for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from vtwcli.errors import NotFoundError, first_line
from vtwcli.models.stored import DOWNLOAD_AGAIN, StoredTensor
from vtwcli.models.unpacking import Unpack


@dataclass(frozen=True)
class PackedTensor:
    """One weight in several stored tensors: its numbers, their scales, zero points...

    Attributes:
        key: the name that the weight would have on disk.
        shape: of the weight itself, not of what is stored.
        parts: what is stored, by the names that the format has for it.
        unpack: parts and a type -> the weight in that type; None where only the library can.
    """

    key: str
    shape: tuple[int, ...]
    parts: Mapping[str, StoredTensor]
    unpack: Unpack | None

    kind = "packed"
    dtype = torch.float32
    """What ``read`` gives."""

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        """The tensors on disk."""
        return tuple(self.parts.values())

    @property
    def file(self) -> Path:
        """The safetensors file, of the first part."""
        return self.stored[0].file

    @property
    def nbytes(self) -> int:
        """Length of all parts in bytes."""
        return sum(part.nbytes for part in self.stored)

    def read(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight, computed in ``dtype``.

        Raises:
            NotFoundError: a file is gone or ends early, or its parts do not fit each other.
        """
        assert self.unpack is not None
        parts = {name: part.read() for name, part in self.parts.items()}
        try:
            weight = self.unpack(parts, dtype)
        except (RuntimeError, ValueError, IndexError, KeyError) as error:
            raise NotFoundError(
                f"{self.key!r} in {self.file} cannot be unpacked: {first_line(error)}", DOWNLOAD_AGAIN
            ) from error
        if tuple(weight.shape) != self.shape:
            raise NotFoundError(
                f"{self.key!r} in {self.file} cannot be unpacked: it becomes {list(weight.shape)}",
                DOWNLOAD_AGAIN,
            )
        return weight

    def fill(self, tensor: torch.Tensor) -> None:
        """Give a CPU tensor the weight, computed in the tensor's own type.

        Raises:
            NotFoundError: as ``read``.
        """
        tensor.copy_(self.read(tensor.dtype))


Weight = StoredTensor | PackedTensor
"""A weight by its own name and shape, however it is stored."""
