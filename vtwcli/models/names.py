"""What a user calls a model by, looked up before anything heavy is imported."""

from __future__ import annotations

import re
from pathlib import Path

from vtwcli.errors import NotFoundError
from vtwcli.io import files


def directory_of(name: str) -> Path | None:
    """The directory of this machine that a model's name stands for; None for a Hub id.

    Args:
        name: a directory, a Hub id with an optional ``@revision``, or ``demo`` (``./demo`` is a directory).

    Raises:
        NotFoundError: it is neither, or the directory cannot be read.
    """
    if name == "demo":
        return files.demo_model()
    path = Path(name).expanduser()
    if name and path.is_dir():
        _check_regular(path)
        return path.resolve()
    if path.is_file():
        raise NotFoundError(f"{name!r} is a file; a model is a directory", f"try {str(path.parent)!r}")
    repo = name.partition("@")[0]
    if not name or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repo, re.ASCII) or name.startswith((".", "~")):
        raise NotFoundError(
            f"there is no directory {name!r}",
            "a model is a local directory, a Hub id such as llava-hf/llava-1.5-7b-hf, or demo",
        )
    return None


def _check_regular(folder: Path) -> None:
    """Refuse a directory with a pipe or a device in it, for which a library that opens it would wait.

    Raises:
        NotFoundError: names it.
    """
    try:
        for file in [*folder.iterdir(), *folder.glob("*/*.jinja")]:
            if file.exists():  # a link that leads nowhere is for whoever needs it to complain about
                files.regular(file)
    except files.IrregularError as error:
        raise NotFoundError(f"{file}: cannot be read: {error}") from None
    except OSError as error:
        raise NotFoundError(f"{folder}: cannot be read: {error.strerror}") from None
