"""Writes results so that nothing is half-written and nothing is overwritten unasked."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from vtwcli.errors import UsageError, VtwError


def check_free(paths: Iterable[Path | None], force: bool) -> None:
    """Refuse early, before long work, what could not be written at its end.

    Raises:
        UsageError: a path exists and ``force`` is off, is a directory, or its folder cannot be written.
    """
    for path in paths:
        if path is None:
            continue
        if path.is_dir():
            raise UsageError(f"{path} is a directory, not a file")
        if path.exists() and not force:
            raise UsageError(f"{path} exists already", "choose another name, or --force to replace it")
        folder = next((parent for parent in path.absolute().parents if parent.exists()), Path("/"))
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise UsageError(f"{path}: cannot write in {folder}")


def write(path: Path, save: Callable[[Path], object]) -> None:
    """Let ``save`` write a temporary file beside ``path``, then rename it into place.

    Raises:
        VtwError: the file system refuses (full disk, no permission).
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
        os.close(handle)
        temporary = Path(name)
        save(temporary)
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)  # mkstemp makes files that only their owner reads
        temporary.replace(path)
    except OSError as error:
        raise VtwError(f"{path}: cannot write: {error.strerror or error}") from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text in one step."""
    write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def document(result: Any, indent: int | None = 1) -> str:
    """A result as JSON text, as files hold it and ``--json`` prints it; a line where ``indent`` is None.

    Raises:
        VtwError: it holds a number that is NaN or infinite, which JSON has no word for; names the key.
    """
    try:
        return json.dumps(result, indent=indent, ensure_ascii=False, allow_nan=False) + "\n"
    except ValueError:
        raise VtwError(
            f"{_not_a_number(result)} is not a finite number, so the result is not written"
        ) from None


def _not_a_number(node: Any, name: str = "") -> str:
    """The dotted key of the first number that is NaN or infinite; empty where there is none."""
    if isinstance(node, float):
        return name if node - node else ""
    items = (
        node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list | tuple) else ()
    )
    found = (_not_a_number(value, f"{name}.{key}".lstrip(".")) for key, value in items)
    return next(filter(None, found), "")
