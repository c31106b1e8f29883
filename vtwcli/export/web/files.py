"""Graphs in files that a browser can load: all in one where it is small, else with data in pieces beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir

from vtwcli.export.onnx.trace import check_file

ALONE = 1 << 30  # bytes of weights up to which they lie in the graph's own file
PIECE = 3 << 29  # of a piece of data: browsers hold buffers below 2 GiB
_SMALL = 1024  # bytes of a tensor that stays in the graph's file


def save(model: ir.Model, path: Path) -> None:
    """Write a graph under the names that transformers.js looks for.

    Raises:
        VtwError: the file does not pass the ONNX checker.
    """
    held = [value for value in model.graph.initializers.values() if value.const_value is not None]
    large = [value for value in held if value.const_value.nbytes > _SMALL]
    if sum(value.const_value.nbytes for value in large) > ALONE:
        for number, piece in enumerate(_pieces(large)):
            name = f"{path.name}_data{f'_{number}' if number else ''}"
            stored = ir.external_data.convert_tensors_to_external(
                [value.const_value for value in piece], path.parent, name
            )
            for value, tensor in zip(piece, stored, strict=True):
                value.const_value = tensor
    ir.save(model, path)
    check_file(path)


def _pieces(values: list[ir.Value]) -> list[list[ir.Value]]:
    pieces: list[list[ir.Value]] = [[]]
    size = 0
    for value in values:
        assert value.const_value is not None
        if pieces[-1] and size + value.const_value.nbytes > PIECE:
            pieces.append([])
            size = 0
        pieces[-1].append(value)
        size += value.const_value.nbytes
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
