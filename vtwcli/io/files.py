"""Single files: what may be opened and where may be written, JSON text, writing in one step."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

from vtwcli.errors import UsageError, VtwError
from vtwcli.io import console
from vtwcli.io.staging import staged

_IRREGULAR = {
    "a pipe": stat.S_ISFIFO,
    "a socket": stat.S_ISSOCK,
    "a device": lambda mode: stat.S_ISCHR(mode) or stat.S_ISBLK(mode),
}


class IrregularError(OSError):
    """What was to be read is a pipe, a socket or a device; opening it could wait for ever."""

    def __init__(self, kind: str) -> None:
        super().__init__(errno.EINVAL, f"it is {kind}, and only files are read")

    def __str__(self) -> str:
        return str(self.strerror)


def regular(path: Path) -> Path:
    """``path``, if opening it does not hang; to be asked before any file of a user is opened.

    Raises:
        OSError: there is nothing, or a pipe, a socket or a device; the reason is in ``strerror``.
    """
    mode = path.stat().st_mode
    for kind, holds in _IRREGULAR.items():
        if holds(mode):
            raise IrregularError(kind)
    return path


def present(path: Path) -> bool:
    """Whether the name is taken, be it by a link that leads nowhere.

    Raises:
        UsageError: no file can have this name.
    """
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        name = str(path) if len(str(path)) <= 80 else f"{str(path)[:77]}..."
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UsageError(f"{name}: cannot be written: {reason}", "choose another name") from None
    return True


def check_folder(path: Path) -> None:
    """Refuse a place whose folder neither exists nor can be made, or cannot be written.

    Raises:
        UsageError: see above.
    """
    folder = next(parent for parent in path.absolute().parents if present(parent))
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"{path}: cannot write in {folder}")


def write(path: Path, save: Callable[[Path], object]) -> None:
    """Let ``save`` write a temporary file, then rename it to ``path``, whatever is there.

    Raises:
        VtwError: the file system refuses (full disk, no permission).
    """
    try:
        with staged(path) as new:
            save(new / path.name)
            (new / path.name).replace(path)
    except OSError as error:
        raise cannot_write(path, error) from None


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text in one step; halves of surrogate pairs, which UTF-8 lacks, are escaped as in JSON."""
    write(path, lambda temporary: temporary.write_text(text, encoding="utf-8", errors=console.ESCAPE))


def cannot_write(path: Path, error: OSError) -> VtwError:
    """The line that tells why a file could not be written."""
    return VtwError(f"{path}: cannot write: {error.strerror or error}")


def document(result: Any, indent: int | None = 1) -> str:
    """A result as JSON text, as files hold it and ``--json`` prints it; a line where ``indent`` is None.

    Raises:
        VtwError: it holds a number that is NaN or infinite, which JSON has no word for; names the key.
    """
    try:
        text = json.dumps(result, indent=indent, ensure_ascii=False, allow_nan=False) + "\n"
    except ValueError:
        raise VtwError(
            f"{_not_a_number(result)} is not a finite number, so the result is not written"
        ) from None
    return text.encode("utf-8", "backslashreplace").decode()  # a lone surrogate as JSON spells it


def _not_a_number(node: Any, name: str = "") -> str:
    """The dotted key of the first number that is NaN or infinite; empty where there is none."""
    if isinstance(node, float):
        return name if node - node else ""
    items = (
        node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list | tuple) else ()
    )
    found = (_not_a_number(value, f"{name}.{key}".lstrip(".")) for key, value in items)
    return next(filter(None, found), "")


def demo_model() -> Path:
    """The directory of the demo model that ships with the package, as ``from_pretrained`` takes it."""
    return Path(str(resources.files("vtwcli") / "demo" / "model"))
