"""Puts a finished directory in its place in one step, so that nobody ever sees half of one."""

from __future__ import annotations

import ctypes
import os
import shutil
import tempfile
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

    After an exception the temporary directory is gone and ``target`` is as it was. An existing directory is
    replaced only with ``force``, and only when the new one is complete.

    Args:
        target: the directory to make.
        force: replace an existing directory.

    Raises:
        UsageError: see ``check_target``.
        VtwError: the file system refuses.
    """
    target = target.absolute()
    check_target(target, force)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    except OSError as error:
        raise VtwError(f"{target}: cannot write: {error.strerror or error}") from error
    try:
        yield temporary
        _move(temporary, target, force)
    except OSError as error:
        raise VtwError(f"{target}: cannot write: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _move(temporary: Path, target: Path, force: bool) -> None:
    mask = os.umask(0)
    os.umask(mask)
    temporary.chmod(0o777 & ~mask)  # mkdtemp makes directories that only their owner reads
    if not target.exists():
        temporary.rename(target)
        return
    check_target(target, force)
    if _exchange(temporary, target):
        return  # the old directory now stands where the new one was made, and goes with it
    # Where two directories cannot change places, the old one steps aside and comes back if the rename fails.
    aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-old-"))
    target.rename(aside / target.name)
    try:
        temporary.rename(target)
    except OSError:
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
