"""What an exported directory says of itself in its manifest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .errors import NotFoundError

MANIFEST = "manifest.json"
FORMAT, FORMAT_VERSION = "vtw-onnx", 1
_OF_A_GRAPH = {"role", "layers", "removal", "inputs", "outputs"}


def is_export(directory: str | Path) -> bool:
    """Whether a directory holds an export to ONNX; nothing but its manifest is read."""
    file = Path(directory) / MANIFEST
    try:
        return file.is_file() and bool(json.loads(file.read_text(encoding="utf-8"))["format"] == FORMAT)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of an exported directory.

    Raises:
        NotFoundError: there is none, or it is of another format, or a graph's file lies elsewhere.
    """
    try:
        for file in directory.iterdir():
            if file.exists() and not (file.is_file() or file.is_dir()):  # whoever opens a pipe waits
                raise ValueError(f"{file.name} is not a file")
        manifest: dict[str, Any] = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT or manifest["format_version"] != FORMAT_VERSION:
            raise ValueError("another format or version")
        for graph in manifest["graphs"]:
            if Path(graph["file"]).name != graph["file"]:
                raise ValueError("a graph lies outside the directory")
            if absent := _OF_A_GRAPH - graph.keys():
                raise ValueError(f"a graph has no {min(absent)}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise NotFoundError(f"{directory} is no exported ONNX model: {error}") from error
    return manifest
