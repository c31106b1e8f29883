"""Tensors in safetensors files: the one place that reads a header, and the one that reads a tensor's bytes.

What a header may say is decided by the safetensors library itself, which maps the file and reads nothing else of
it: a file that it refuses is refused here, and one that it takes is taken.
"""

from __future__ import annotations

import math
import stat
from dataclasses import dataclass
from pathlib import Path

import torch

from vtwcli.errors import NotFoundError

DOWNLOAD_AGAIN = "copy or download the model again"

_TYPES: dict[str, tuple[int, torch.dtype | None]] = {
    "BOOL": (8, torch.bool),
    "F4": (4, None),
    "F6_E2M3": (6, None),
    "F6_E3M2": (6, None),
    "U8": (8, torch.uint8),
    "I8": (8, torch.int8),
    "F8_E5M2": (8, torch.float8_e5m2),
    "F8_E4M3": (8, torch.float8_e4m3fn),
    "F8_E8M0": (8, torch.float8_e8m0fnu),
    "F8_E4M3FNUZ": (8, torch.float8_e4m3fnuz),
    "F8_E5M2FNUZ": (8, torch.float8_e5m2fnuz),
    "I16": (16, torch.int16),
    "U16": (16, torch.uint16),
    "F16": (16, torch.float16),
    "BF16": (16, torch.bfloat16),
    "I32": (32, torch.int32),
    "U32": (32, torch.uint32),
    "F32": (32, torch.float32),
    "C64": (64, torch.complex64),
    "F64": (64, torch.float64),
    "I64": (64, torch.int64),
    "U64": (64, torch.uint64),
}
"""The types of the format: bits of a value, and the torch type, where torch holds one value of it on its own."""

NAMES = {dtype: name for name, (_, dtype) in _TYPES.items() if dtype is not None}
"""The format's names for torch's types."""


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

    def read_into(self, tensor: torch.Tensor) -> None:
        """Read the values into a contiguous CPU tensor of the same type and size, with plain reads.

        Raises:
            NotFoundError: the file is gone or ends early.
        """
        view = tensor.flatten().view(torch.uint8).numpy().data
        try:
            with self.file.open("rb", buffering=0) as stream:
                stream.seek(self.start)
                while view:
                    count = stream.readinto(view)
                    if not count:
                        raise NotFoundError(f"weight file {self.file} ends within {self.key!r}")
                    view = view[count:]
        except OSError as error:
            raise NotFoundError(f"weight file {self.file} cannot be read: {error.strerror}") from error

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
        info = file.stat()
        if not stat.S_ISREG(info.st_mode):
            raise NotFoundError(f"weight file {file} is no regular file", DOWNLOAD_AGAIN)
        with file.open("rb") as stream:
            place = 8 + int.from_bytes(stream.read(8), "little")
        tensors = {}
        with safe_open(file, "np") as opened:
            metadata = opened.metadata()  # in no order, as what follows
            # the library takes a file only if the tensors follow each other without gaps, so that sizes give places
            for key in opened.offset_keys():
                entry = opened.get_slice(key)
                kind, shape = entry.get_dtype(), tuple(entry.get_shape())
                if kind not in _TYPES:
                    raise NotFoundError(f"weight file {file}: {key!r} is of the unknown type {kind}")
                bits, dtype = _TYPES[kind]
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
