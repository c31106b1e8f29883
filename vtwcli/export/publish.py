"""Puts a finished directory in its place in one step, so that nobody ever sees half of one."""

from __future__ import annotations

import ctypes
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vtwcli.errors import UsageError, VtwError


def check_target(target: Path, force: bool) -> None:
    """Refuse, before long work, a target that could not be published.

    Raises:
        UsageError: the target is a file, exists and ``force`` is off, or its parent cannot be written.
    """
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise UsageError(f"{target} exists and is not a directory", "choose another name")
    if target.exists() and not force:
        raise UsageError(f"{target} exists already", "choose another name, or --force to replace it")
    folder = next(parent for parent in target.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UsageError(f"{target}: cannot write in {folder}")


@contextmanager
def publish(target: Path, force: bool) -> Iterator[Path]:
    """Yield a temporary directory beside ``target`` and rename it to ``target`` when the block ends well.

    After an exception, Ctrl-C and SIGTERM included, the temporary directory is gone and ``target`` is as it was. An
    existing directory is replaced only with ``force``, and only when the new one is complete.

    Args:
        target: the directory to make.
        force: replace an existing directory.

    Raises:
        UsageError: see ``check_target``.
        VtwError: the file system refuses.
    """
    target = target.absolute()
    check_target(target, force)
    temporary = target.parent / f".{target.name}-{uuid.uuid4().hex[:12]}"
    try:  # the name comes first, so that a signal at any moment finds it
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        _move(temporary, target, force)
    except OSError as error:
        raise VtwError(f"{target}: cannot write: {error.strerror or error}") from error
    finally:
        _remove(temporary)


def _remove(folder: Path) -> None:
    try:
        shutil.rmtree(folder, ignore_errors=True)
    except BaseException:  # a signal in the middle: the work is done first, then it has its way
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _move(temporary: Path, target: Path, force: bool) -> None:
    if not target.exists():
        temporary.rename(target)
        return
    check_target(target, force)
    if _exchange(temporary, target):
        return  # the old directory now stands where the new one was made, and goes with it
    # Where two directories cannot change places, the old one steps aside and comes back if the rename fails.
    aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-old-"))
    try:
        target.rename(aside / target.name)
        temporary.rename(target)
    except BaseException:
        if not target.exists():
            (aside / target.name).rename(target)
        raise
    finally:
        if target.exists():
            shutil.rmtree(aside, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Let two directories change names in one step (Linux ``renameat2``); False where the system cannot."""
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    try:
        rename = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    return bool(rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0)
