"""Whether all code in an exported directory is this tool's own; nothing of the directory is run to find out.

Code is what Python or transformers would run: Python files and compiled ones at any depth, and the entries of the
config files that lead transformers to code.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vtwcli.errors import NotFoundError, UsageError
from vtwcli.export.directory.manifest import save_json
from vtwcli.io.files import regular

RELEASED: dict[str, frozenset[str]] = {}
"""SHA-256 of the code files that earlier releases wrote, by file name; this version's are made from the package."""

_CODE = (".py", ".pyw", ".pyc", ".pyo", ".pyd", ".so", ".dylib", ".dll")
_LEADS_TO_CODE = ("auto_map", "custom_generate")
_HINT = "read it, then add --trust-remote-code; or export again"


def read_own_code(directory: Path, own: Mapping[str, str], code_map: Mapping[str, str]) -> dict[str, bytes]:
    """The code files of an export and the configs of its model, as they were when they were checked.

    Args:
        directory: the export.
        own: file name -> text of what this version writes.
        code_map: the ``auto_map`` that its config.json may have.

    Returns:
        File name -> content: of ``own``, of config.json and of generation_config.json.

    Raises:
        UsageError: a file that no version of this tool writes, or a config that leads to other code.
        NotFoundError: a file that cannot be read.
    """
    found = {}
    for file in _files(directory):
        name = str(file.relative_to(directory))
        if file.suffix.lower() in _CODE:
            data = _read(file)
            if name not in own or (
                data != own[name].encode("utf-8")
                and hashlib.sha256(data).hexdigest() not in RELEASED.get(name, ())
            ):
                if "__pycache__" in file.parts:
                    raise UsageError(
                        f"{file} is compiled code, which nobody can tell from other, so nothing of {directory} is run",
                        "remove it; Python makes it anew",
                    )
                raise UsageError(
                    f"{file} is not the code that this version of vtwcli exports, so nothing of {directory} is run",
                    _HINT,
                )
            found[name] = data
        elif file.name.endswith("config.json"):
            data = _read(file)
            _check_config(file, data, code_map if name == "config.json" else {})
            if name in ("config.json", "generation_config.json"):
                found[name] = data
    if absent := sorted(own.keys() - found.keys()):
        raise UsageError(f"{directory / absent[0]} is missing, so nothing of {directory} is run", _HINT)
    return found


def without_code_map(file: Path) -> None:
    """Take the entries out of a copied config that lead to code, which is not copied; others stay as they are."""
    try:
        config = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        return  # not for this to tell
    if drop_code_map(config):
        save_json(file, config)


def drop_code_map(config: Any) -> bool:
    """Take the entries out of a config, at any depth, that lead to code; returns whether there were any."""
    found = False
    for node in _mappings(config):
        for key in _LEADS_TO_CODE:
            found |= node.pop(key, None) is not None
    return found


def _mappings(config: Any) -> Iterator[dict[str, Any]]:
    """Every mapping in a JSON document, at any depth."""
    waiting = [config]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            yield node
            waiting += node.values()
        elif isinstance(node, list):
            waiting += node


def _files(directory: Path) -> Iterator[Path]:
    """Every file, in order; what lies behind a link to a directory cannot be told from the rest, so none is taken."""
    for place, folders, names in os.walk(directory):
        for folder in sorted(folders):
            if (Path(place) / folder).is_symlink():
                raise UsageError(
                    f"{Path(place) / folder} is a link to a directory, so nothing of {directory} is run",
                    _HINT,
                )
        folders.sort()
        yield from (Path(place) / name for name in sorted(names))


def _read(file: Path) -> bytes:
    try:
        return regular(file).read_bytes()
    except OSError as error:
        raise NotFoundError(f"{file} cannot be read: {error.strerror or error}") from error


def _check_config(file: Path, data: bytes, code_map: Mapping[str, str]) -> None:
    if file.name == "adapter_config.json":  # names another model, and changes what is loaded
        raise UsageError(f"{file} belongs to an adapter, which vtw export did not write", _HINT)
    try:
        config = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise NotFoundError(f"{file} is not readable JSON: {error}") from error
    for node in _mappings(config):
        for key in _LEADS_TO_CODE:
            if key in node and not (node is config and key == "auto_map" and node[key] == code_map):
                raise UsageError(
                    f"{file}: {key} leads to code that vtw export did not name, so nothing of {file.parent} is run",
                    _HINT,
                )
