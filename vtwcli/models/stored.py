"""Tensors in safetensors files: the one place that reads a header, and the one that reads a tensor's bytes.

What a header may say is decided by the safetensors library itself, which maps the file and reads nothing else of
it: a file that it refuses is refused here, and one that it takes is taken.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import torch

from vtwcli.errors import NotFoundError
from vtwcli.io.files import regular
from vtwcli.models.dtypes import STORED, torch_type

DOWNLOAD_AGAIN = "copy or download the model again"


@dataclass(frozen=True)
class StoredTensor:
    """One tensor on disk.

    Attributes:
        file: the safetensors file.
        key: the tensor's name in that file.
        kind: its type as the format calls it.
        dtype: the torch type, or None where torch has none; such a tensor can be copied but not computed with.
        shape: as stored.
        start: offset of its first byte, from the beginning of the file.
        nbytes: length in bytes.
    """

    file: Path
    key: str
    kind: str
    dtype: torch.dtype | None
    shape: tuple[int, ...]
    start: int
    nbytes: int

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        """Itself: what there is on disk of it."""
        return (self,)

    def read_into(self, tensor: torch.Tensor) -> None:
        """Read the values into a contiguous CPU tensor of the same type and size, with plain reads.

        Raises:
            NotFoundError: the file is gone or ends early.
        """
        with self._opened() as stream:
            self._fill(stream, tensor.flatten().view(torch.uint8).numpy().data)

    def fill(self, tensor: torch.Tensor) -> None:
        """Give a contiguous CPU tensor the stored values, in the tensor's own type.

        Raises:
            NotFoundError: as ``read``.
        """
        if self.dtype == tensor.dtype:
            self.read_into(tensor)
        else:
            tensor.copy_(self.read())

    def runs(self, size: int) -> Iterator[bytearray]:
        """The bytes as they are on disk, at most ``size`` of them at a time.

        Raises:
            NotFoundError: the file is gone or ends early.
        """
        left = self.nbytes
        with self._opened() as stream:
            while left:
                raw = bytearray(min(left, size))
                self._fill(stream, memoryview(raw))
                left -= len(raw)
                yield raw

    @contextmanager
    def _opened(self) -> Iterator[FileIO]:
        try:
            with self.file.open("rb", buffering=0) as stream:
                stream.seek(self.start)
                yield stream
        except OSError as error:
            raise NotFoundError(f"weight file {self.file} cannot be read: {error.strerror}") from error

    def _fill(self, stream: FileIO, view: memoryview) -> None:
        while view:
            count = stream.readinto(view)
            if not count:
                raise NotFoundError(f"weight file {self.file} ends within {self.key!r}")
            view = view[count:]

    def read(self) -> torch.Tensor:
        """The values as they are on disk.

        Raises:
            NotFoundError: the file is gone or ends early, or torch has no such type.
        """
        if self.dtype is None:
            raise NotFoundError(
                f"{self.key!r} in {self.file} is of type {self.kind}, which torch does not have"
            )
        tensor = torch.empty(self.shape, dtype=self.dtype)
        self.read_into(tensor)
        return tensor


@dataclass(frozen=True)
class Header:
    """What one safetensors file says of itself.

    Attributes:
        metadata: free text by name, or None where the file has no such part.
        tensors: by name, in the order of their bytes.
    """

    metadata: dict[str, str] | None
    tensors: dict[str, StoredTensor]


def read_header(file: Path) -> Header:
    """The header of a safetensors file, checked by the library: it reads the header only.

    Raises:
        NotFoundError: the file is missing, no regular file, truncated, or not what the library takes.
    """
    from safetensors import SafetensorError, safe_open

    try:
        info = regular(file).stat()
        with file.open("rb") as stream:
            place = 8 + int.from_bytes(stream.read(8), "little")
        tensors = {}
        with safe_open(file, "np") as opened:
            metadata = opened.metadata()  # in no order, as what follows
            # the library takes a file only if the tensors follow each other without gaps, so that sizes give places
            for key in opened.offset_keys():
                entry = opened.get_slice(key)
                kind, shape = entry.get_dtype(), tuple(entry.get_shape())
                if kind not in STORED:
                    raise NotFoundError(f"weight file {file}: {key!r} is of the unknown type {kind}")
                bits, name = STORED[kind]
                dtype = None if name is None else torch_type(name)
                size = math.prod(shape) * bits // 8
                tensors[key] = StoredTensor(file, key, kind, dtype, shape, place, size)
                place += size
    except FileNotFoundError as error:
        raise NotFoundError(f"weight file {file} is missing", DOWNLOAD_AGAIN) from error
    except OSError as error:
        raise NotFoundError(
            f"weight file {file} cannot be read: {error.strerror or error}", DOWNLOAD_AGAIN
        ) from error
    except SafetensorError as error:
        reason = str(error).removeprefix("Error while deserializing header: ")
        raise NotFoundError(
            f"weight file {file} is truncated or corrupt ({info.st_size:,} bytes): {reason}", DOWNLOAD_AGAIN
        ) from error
    if place != info.st_size:
        raise NotFoundError(
            f"weight file {file} is corrupt: {info.st_size:,} bytes instead of {place:,}", DOWNLOAD_AGAIN
        )
    ordered = sorted(tensors.values(), key=lambda tensor: (tensor.start, tensor.key))
    return Header(
        None if metadata is None else dict(sorted(metadata.items())),
        {tensor.key: tensor for tensor in ordered},
    )
