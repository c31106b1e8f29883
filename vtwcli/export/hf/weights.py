"""Puts a checkpoint's weight files into an exported directory: linked, copied, or converted to another type."""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
from pathlib import Path

import torch

from vtwcli.errors import NotFoundError, UsageError
from vtwcli.io import console
from vtwcli.judge.kl import is_finite
from vtwcli.models.checkpoint import Checkpoint
from vtwcli.models.dtypes import FLOATS, name_of, stored_name
from vtwcli.models.jsonfiles import read_json
from vtwcli.models.packed import Weight
from vtwcli.models.stored import StoredTensor, read_header

_CHUNK = 1 << 24  # bytes converted at a time, a multiple of every type's size
_MIB = 1 << 20


def check_finite(checkpoint: Checkpoint) -> None:
    """Read every weight that the model loads once, a few MiB at a time, and refuse one with NaN or infinity.

    It takes less time than the digests of the manifest do. Integers are passed over, and so are eight-bit floats,
    whose scales are elsewhere. A buffer may hold infinities on purpose, as masks do, but no NaN.

    Raises:
        NotFoundError: naming the weight and its file.
    """
    parameters = {name for name, _ in checkpoint.skeleton().named_parameters(remove_duplicate=False)}
    loaded: dict[str, tuple[StoredTensor, bool]] = {}
    sources: list[tuple[str, tuple[Weight, ...]]] = [
        (name, (one,)) for name, one in checkpoint.key_map.items()
    ]
    sources += [(name, conversion.sources) for name, conversion in checkpoint.conversions.items()]
    for name, weights in sources:
        stored = [tensor for weight in weights for tensor in weight.stored]
        loaded |= {tensor.key: (tensor, name in parameters) for tensor in stored}
    tensors = [one for one in loaded.values() if _is_converted(one[0])]
    done = 0
    with console.progress("checking weights, MiB", sum(t.nbytes for t, _ in tensors) // _MIB) as bar:
        for tensor, parameter in sorted(tensors, key=lambda one: (one[0].file, one[0].start)):
            for raw in tensor.runs(_CHUNK):
                assert tensor.dtype is not None
                values = torch.frombuffer(raw, dtype=tensor.dtype)
                if not is_finite(values) and (parameter or bool(values.isnan().any())):
                    raise NotFoundError(
                        f"the weights of {checkpoint.name!r} are broken: {tensor.key!r} in {tensor.file.name} holds "
                        "values that are not finite (NaN or infinity)",
                        "download or convert them again; float16 ends at 65504, bfloat16 and float32 reach further",
                    )
                done += len(raw)
                bar.advance(done // _MIB)
                done %= _MIB


def place_weights(checkpoint: Checkpoint, folder: Path, dtype: torch.dtype | None) -> str:
    """Bring the weight files and their index into ``folder`` under their own names.

    Files stay byte for byte as they are, and take no space where the file system can link them, unless ``dtype``
    differs from what is stored. A linked file is the checkpoint's own: its mode is left alone, and who writes into
    it in place changes both. (``save_pretrained`` does not: safetensors writes a new file and renames it.)

    Returns:
        ``linked``, ``copied`` or ``converted``.

    Raises:
        UsageError: a value does not fit into ``dtype``, or the weights are quantized.
    """
    if dtype is not None and checkpoint.quantization is not None:
        raise UsageError(
            f"{checkpoint.name!r} is quantized ({checkpoint.quantization.scheme}), so its weights stay as they are",
            "leave out --dtype",
        )
    files = sorted({tensor.file for tensor in checkpoint.tensors.values()})
    changes = dtype is not None and any(_target(t, dtype) is not None for t in checkpoint.tensors.values())
    if dtype is not None and changes:
        size = checkpoint.total_bytes // _MIB
        with console.progress("converting weights, MiB", size) as bar:
            for file in files:
                _convert(file, folder / file.name, dtype, bar)
        _write_index(checkpoint, folder, True)
        return "converted"
    linked = []
    with console.progress("weights", len(files)) as bar:
        for file in files:
            linked.append(_link_or_copy(file, folder / file.name))
            bar.advance()
    _write_index(checkpoint, folder, False)
    return "linked" if all(linked) else "copied"


def _link_or_copy(source: Path, target: Path) -> bool:
    """Whether the file could be linked; a Hub cache holds links, so what they point to is meant."""
    source = source.resolve()
    try:
        os.link(source, target)
        return True
    except OSError:  # another file system, one without links, or another owner's file
        shutil.copyfile(source, target)
        return False


def _is_converted(tensor: StoredTensor) -> bool:
    """Whether it holds floats that could be others; eight-bit ones have scales elsewhere."""
    return tensor.dtype is not None and name_of(tensor.dtype) in FLOATS


def _target(tensor: StoredTensor, wanted: torch.dtype) -> torch.dtype | None:
    """The type that a tensor is converted to, or None where it stays as it is."""
    return wanted if _is_converted(tensor) and tensor.dtype != wanted else None


def _convert(source: Path, target: Path, dtype: torch.dtype, bar: console.Task) -> None:
    """Write one safetensors file with its floating-point tensors in ``dtype``, a few MiB in memory at a time."""
    old = read_header(source)
    tensors = list(old.tensors.values())
    header: dict[str, object] = {} if old.metadata is None else {"__metadata__": old.metadata}
    end = 0
    for tensor in tensors:
        kind = _target(tensor, dtype)
        size = tensor.nbytes if kind is None else math.prod(tensor.shape) * kind.itemsize
        header[tensor.key] = {
            "dtype": tensor.kind if kind is None else stored_name(kind),
            "shape": list(tensor.shape),
            "data_offsets": [end, end + size],
        }
        end += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the data to eight bytes
    done = 0
    with target.open("wb") as writer:
        writer.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            for raw in tensor.runs(_CHUNK):
                writer.write(_cast(raw, tensor, _target(tensor, dtype)))
                done += len(raw)
                bar.advance(done // _MIB)
                done %= _MIB


def _cast(raw: bytearray, tensor: StoredTensor, dtype: torch.dtype | None) -> bytes | bytearray:
    """A run of values in ``dtype``, little-endian as safetensors stores them."""
    if dtype is None:
        return raw
    assert tensor.dtype is not None
    values = torch.frombuffer(raw, dtype=tensor.dtype)
    cast = values.to(dtype)
    if not bool((cast.isfinite() | ~values.isfinite()).all()):
        name = name_of(dtype)
        raise UsageError(
            f"{tensor.key!r} holds values that are too large for {name}",
            "convert to bfloat16, which has the range of float32",
        )
    return cast.view(torch.uint8).numpy().tobytes()


def _write_index(checkpoint: Checkpoint, folder: Path, converted: bool) -> None:
    """Copy the index of a sharded checkpoint; converted weights have another total size."""
    source = checkpoint.entry
    if not source.name.endswith(".json"):
        return
    index = read_json(source)
    if converted and "total_size" in index["metadata"]:
        files = {tensor.file.name for tensor in checkpoint.tensors.values()}
        stored = [tensor for name in files for tensor in read_header(folder / name).tensors.values()]
        index["metadata"]["total_size"] = sum(tensor.nbytes for tensor in stored)
        (folder / source.name).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    else:
        shutil.copyfile(source, folder / source.name)
