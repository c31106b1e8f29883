"""Graphs in files that a browser can load: all in one where it is small, else with data in pieces beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from vtwcli.export.onnx.trace import check_file
from vtwcli.export.web.graphs import DECODER
from vtwcli.export.web.kind import FOLDER, SUFFIXES

ALONE = 1 << 30  # bytes of weights up to which they lie in the graph's own file
PIECE = 3 << 29  # of a piece of data: browsers hold buffers below 2 GiB
_KINDS = {"int8": "q8", "int4": "q4"}  # the library's names of what was quantized
_SMALL = 1024  # bytes of a tensor that stays in the graph's file


def save(model: ir.Model, path: Path) -> None:
    """Write a graph under the names that transformers.js looks for.

    Raises:
        VtwError: the file does not pass the ONNX checker.
    """
    weights = {
        value: value.const_value
        for value in model.graph.initializers.values()
        if value.const_value is not None and value.const_value.nbytes > _SMALL
    }
    if sum(tensor.nbytes for tensor in weights.values()) > ALONE:
        for number, piece in enumerate(_pieces(weights)):
            name = f"{path.name}_data{f'_{number}' if number else ''}"
            tensors = [weights[value] for value in piece]
            stored = ir.external_data.convert_tensors_to_external(tensors, path.parent, name)
            for value, tensor in zip(piece, stored, strict=True):
                value.const_value = tensor
        inside = [value for value in model.graph.initializers.values() if value not in weights]
    else:
        inside = list(model.graph.initializers.values())
    for value in inside:  # of a graph that was read from files which do not stay
        if isinstance(value.const_value, ir.ExternalTensor):
            [value.const_value] = ir.external_data.convert_tensors_from_external([value.const_value])
    ir.save(model, path)
    check_file(path)


def _pieces(weights: Mapping[ir.Value, ir.TensorProtocol]) -> list[list[ir.Value]]:
    pieces: list[list[ir.Value]] = [[]]
    size = 0
    for value, tensor in weights.items():
        if pieces[-1] and size + tensor.nbytes > PIECE:
            pieces.append([])
            size = 0
        pieces[-1].append(value)
        size += tensor.nbytes
    return pieces


def beside(path: Path) -> list[Path]:
    """The data files of a graph."""
    return sorted(path.parent.glob(f"{path.name}_data*"))


def chunks(path: Path) -> int:
    """How many data files a graph has."""
    return len(beside(path))


def requantize(path: Path, target: Path, quantize: Callable[[Path], None]) -> None:
    """Write a graph quantized under another name, and take the first away.

    Args:
        path: the graph.
        target: what is written.
        quantize: replaces a file and its data, ``FILE.data``, by the quantized ones.
    """
    first = beside(path)
    quantize(path)
    save(ir.load(path), target)
    for file in (path, path.with_name(f"{path.name}.data"), *first):
        file.unlink(missing_ok=True)


def of_the_library(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What goes into the config for the library: which types there are, and which graphs have data beside them."""
    files = {graph["role"]: Path(graph["file"]) for graph in manifest["graphs"]}
    library: dict[str, Any] = {"dtype": {graph["role"]: graph["dtype"] for graph in manifest["graphs"]}}
    beside = {file.name: number for file in files.values() if (number := chunks(folder / file))}
    if beside:
        library["use_external_data_format"] = beside
    if manifest["dtype"] == "fp16":  # for releases that do not read it off the graph
        library["kv_cache_dtype"] = {"fp16": "float16"}
    return library


def quantized(folder: Path, manifest: dict[str, Any], quantize: str) -> None:
    """Put the decoder in 8 or 4 bits in the place of the one in float32, in a file and in the manifest.

    Raises:
        VtwError: nothing could be quantized.
    """
    from vtwcli.export.onnx import quantize as quantizers

    entry = next(graph for graph in manifest["graphs"] if graph["role"] == DECODER)
    kind = _KINDS[quantize]
    name = f"{FOLDER}/{DECODER}{SUFFIXES[kind]}.onnx"
    requantize(folder / entry["file"], folder / name, lambda path: quantizers.quantize(path, quantize))
    entry |= {"file": name, "dtype": kind}
    manifest["quantize"] = quantize
