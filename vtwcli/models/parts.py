"""Where the parts of packed weights lie in the files of each library, and what shapes the weights have.

Each function takes stored tensors by name and the settings of the quantization, and gives the weights among them.
Shapes are the weights' own; what stands in a few values (a shape, the state of a quantization) is read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from vtwcli.errors import NotFoundError
from vtwcli.models import unpacking
from vtwcli.models.packed import PackedTensor
from vtwcli.models.stored import StoredTensor

Tensors = Mapping[str, StoredTensor]
Settings = Mapping[str, Any]

COMPRESSED = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
"""The formats of compressed-tensors that are unpacked here."""

_MANY = 1 << 16  # bytes of what is read to learn a shape; a real one takes some hundred
_STATE = ".quant_state.bitsandbytes__"
_COMPRESSED_PARTS = (
    "weight",
    "weight_packed",
    "weight_scale",
    "weight_shape",
    "weight_zero_point",
    "weight_g_idx",
)


def groups(settings: Settings) -> list[Settings]:
    """The schemes of compressed-tensors; none of other methods."""
    return [group for group in (settings.get("config_groups") or {}).values() if isinstance(group, Mapping)]


def weight_settings(settings: Settings) -> list[Settings]:
    """How they quantize weights, of those that do."""
    return [group["weights"] for group in groups(settings) if group.get("weights")]


def _parts(tensors: Tensors, before: str, names: Sequence[str]) -> dict[str, StoredTensor]:
    """What is stored under ``before`` and one of the names."""
    return {name: tensors[before + name] for name in names if before + name in tensors}


def _needed(parts: Mapping[str, StoredTensor], names: Sequence[str], owner: str) -> None:
    for name in names:
        if name not in parts:
            raise NotFoundError(f"the weights are incomplete: {owner + name!r} is missing")
        if name != "weight" and len(parts[name].shape) > 2:
            raise NotFoundError(f"{owner + name!r} is {list(parts[name].shape)}, which is no quantized layer")


def _matrix(part: StoredTensor, owner: str) -> tuple[int, int]:
    """Rows and columns of a stored part."""
    if len(part.shape) != 2:
        raise NotFoundError(f"{owner!r} has a part of shape {list(part.shape)}, which is no quantized layer")
    rows, columns = part.shape
    return rows, columns


def _small(part: StoredTensor) -> torch.Tensor:
    """The values of a part that tells something of another."""
    if part.nbytes > _MANY:
        raise NotFoundError(
            f"{part.key!r} in {part.file} takes {part.nbytes:,} bytes, far more than it should"
        )
    return part.read()


def compressed(tensors: Tensors, settings: Settings) -> Iterator[PackedTensor]:
    """Of compressed-tensors."""
    known = weight_settings(settings)
    blocks = {tuple(one["block_structure"]) for one in known if isinstance(one.get("block_structure"), list)}
    for key in tensors:
        owner, _, leaf = key.rpartition("weight_scale")
        if leaf:
            continue
        parts = _parts(tensors, owner, (*_COMPRESSED_PARTS, "weight_global_scale"))
        packed = parts.get("weight_packed", parts.get("weight"))
        if not owner or packed is None:
            continue
        rows, columns = _matrix(packed, owner)
        bits, unpack = 8, None
        if packed.kind == "U8":  # two numbers in a byte, by formats that only the library unpacks
            columns *= 2
        else:
            if "weight_packed" in parts:
                _needed(parts, ("weight_shape",), owner)
                rows, columns = _shape_of(parts["weight_shape"])
                fitting = [
                    one.get("num_bits", 8)
                    for one in known
                    if -(-columns * one.get("num_bits", 8) // 32) == packed.shape[1]
                ]
                if not fitting or not 1 <= fitting[0] <= 8:
                    raise NotFoundError(
                        f"{packed.key!r} is {list(packed.shape)} for a weight of {[rows, columns]}"
                    )
                bits = fitting[0]
            block = next(iter(blocks)) if len(blocks) == 1 else None
            unpack = unpacking.compressed((rows, columns), bits, block)
        yield PackedTensor(f"{owner}weight", (rows, columns), parts, unpack)


def _shape_of(part: StoredTensor) -> tuple[int, int]:
    values = _small(part).flatten().tolist()
    if len(values) != 2 or not all(isinstance(value, int) and 0 < value < 2**31 for value in values):
        raise NotFoundError(f"{part.key!r} in {part.file} holds {values[:4]}, which is no shape of a layer")
    return values[0], values[1]


def gptq(tensors: Tensors, settings: Settings) -> Iterator[PackedTensor]:
    """Of GPTQ."""
    for key in tensors:
        if key.endswith(".qweight"):
            owner = key.removesuffix("qweight")
            parts = _parts(tensors, owner, ("qweight", "qzeros", "scales", "g_idx"))
            _needed(parts, ("qweight", "qzeros", "scales"), owner)
            words, outputs = _matrix(parts["qweight"], owner)
            bits = settings.get("bits")
            if "g_idx" in parts and parts["g_idx"].shape[0]:  # single layers may have another number of bits
                bits = 32 * words // parts["g_idx"].shape[0]
            if bits not in (2, 4, 8):
                raise NotFoundError(f"{key!r} has {bits} bits a weight, which is not supported")
            shape = (outputs, words * 32 // bits)
            old = settings.get("checkpoint_format", "gptq") == "gptq"
            yield PackedTensor(f"{owner}weight", shape, parts, unpacking.gptq(shape, bits, old))


def awq(tensors: Tensors, settings: Settings) -> Iterator[PackedTensor]:
    """Of AWQ (``gemm``)."""
    for key in tensors:
        if key.endswith(".qweight"):
            owner = key.removesuffix("qweight")
            parts = _parts(tensors, owner, ("qweight", "qzeros", "scales"))
            _needed(parts, ("qweight", "scales"), owner)
            inputs, words = _matrix(parts["qweight"], owner)
            shape = (words * 8, inputs)
            yield PackedTensor(f"{owner}weight", shape, parts, unpacking.awq(shape))


def bitsandbytes(tensors: Tensors, settings: Settings) -> Iterator[PackedTensor]:
    """Of bitsandbytes: four bits with their state beside them, or eight with one scale a row."""
    for key in tensors:
        name, found, kind = key.partition(_STATE)
        if found:
            ends = ("", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", f"{_STATE}{kind}")
            try:
                shape = json.loads(bytes(_small(tensors[key]).tolist()))["shape"]
                sizes = tuple(int(size) for size in shape)
            except (ValueError, TypeError, KeyError) as error:
                raise NotFoundError(f"{key!r} describes no weight") from error
            parts = _parts(tensors, name, ends)
            _needed(parts, ("", ".absmax", ".quant_map"), name)
            if math.prod(parts[""].shape) != -(-math.prod(sizes) // 2):
                raise NotFoundError(f"{name!r} is {list(parts[''].shape)} for a weight of {list(sizes)}")
            yield PackedTensor(name, sizes, parts, None)
        elif key.endswith(".SCB"):
            owner = key.removesuffix("SCB")
            parts = _parts(tensors, owner, ("weight", "SCB", "weight_format"))
            _needed(parts, ("weight",), owner)
            yield PackedTensor(f"{owner}weight", parts["weight"].shape, parts, None)


def torchao(tensors: Tensors, settings: Settings) -> Iterator[PackedTensor]:
    """Of torchao's tensors of eight and four bits."""
    ends = ("qdata", "scale", "zero_point", "scale_and_zero", "per_tensor_scale", "act_pre_scale")
    for key in tensors:
        before, found, rest = key.rpartition("_qdata")
        owner, dot, name = before.rpartition("._")
        if found and dot and not rest:
            parts = _parts(tensors, f"{before}_", ends)
            shape = parts["qdata"].shape
            if parts["qdata"].kind == "U8":
                shape = (*shape[:-1], shape[-1] * 2)
            yield PackedTensor(f"{owner}.{name}", shape, parts, None)
