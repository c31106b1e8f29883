"""What such a directory says of itself, and how the library names its files."""

from __future__ import annotations

import json
from pathlib import Path

from vtwcli.export.directory.manifest import MANIFEST
from vtwcli.io.files import regular

FORMAT, FORMAT_VERSION = "vtw-transformers.js", 1
FOLDER = "onnx"
SUFFIXES = {"fp32": "", "fp16": "_fp16", "q8": "_quantized", "q4": "_q4"}


def is_web_export(directory: Path) -> bool:
    """Whether a directory holds an export to transformers.js; nothing but its manifest is read."""
    try:
        manifest = json.loads(regular(directory / MANIFEST).read_text(encoding="utf-8"))
        return bool(manifest["format"] == FORMAT)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False
