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
    """Write UTF-8 text in one step; a lone surrogate, which UTF-8 lacks, is spelled out as ``\\ud800``."""
    data = text.encode("utf-8", "backslashreplace")
    write(path, lambda temporary: temporary.write_bytes(data))


def document(result: Any) -> str:
    """A result as JSON text, as files hold it and ``--json`` prints it."""
    text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
    return text.encode("utf-8", "backslashreplace").decode()  # a lone surrogate as JSON spells it
