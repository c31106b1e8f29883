"""Files and directories that nobody sees half-made, and that nothing is lost for.

What is written is made in a staging directory beside its place and renamed at the end. A lock in the staging
directory tells the next run whether the process that made it is still there; what a killed process left is removed,
or put in place where all of it was ready.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TypedDict

from vtwcli.errors import VtwError

_LOCK, _NEW, _JOURNAL = "lock", "new", "journal.json"
_WAIT_S = 10.0  # for another process that is just renaming files in the same directory
_STAGE = re.compile(r"\.vtw-[0-9a-f]{8}-[0-9a-f]{12}")

Signature = tuple[int, int, int]
"""Inode, size and time of a file: whether it is still the one that was looked at."""


def stage_prefix(name: str) -> str:
    """How the names of a target's staging directories begin."""
    return f".vtw-{hashlib.sha256(os.fsencode(name)).hexdigest()[:8]}-"


def is_stage(name: str) -> bool:
    """Whether a directory of this name is one in which a run makes, or made, its results."""
    return bool(_STAGE.fullmatch(name))


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """Yield an empty directory beside ``target``, gone at the end, after whatever exception or signal.

    What killed processes left of the same target is removed first.
    """
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    sweep(target)
    lock: int | None = None
    place = target
    try:
        while lock is None:  # another process may take a directory whose lock is not there yet for a dead one
            place = target.with_name(stage_prefix(target.name) + uuid.uuid4().hex[:12])
            place.mkdir()  # the name comes first, so that a signal at any moment finds it
            lock = _take(place, wanted=True)
        (place / _NEW).mkdir()
        yield place / _NEW
    finally:
        if place != target:
            _remove(place)
        if lock is not None:
            os.close(lock)


def sweep(target: Path, everything: bool = False) -> None:
    """Remove what killed processes left beside ``target``; files that were all ready are put in their places.

    Args:
        everything: of all targets in the same folder.
    """
    try:
        found = [place for place in target.parent.iterdir() if is_stage(place.name)]
    except OSError:
        return
    for place in found:
        if not everything and not place.name.startswith(stage_prefix(target.name)):
            continue
        if place.is_symlink() or not place.is_dir() or (lock := _take(place)) is None:
            continue
        try:
            with alone_in([place.parent]):
                _finish(place)
            _remove(place)
        finally:
            os.close(lock)


def _take(place: Path, wanted: bool = False) -> int | None:
    """Lock a staging directory; None where another process has it, or it has just been removed.

    Args:
        wanted: go on without a lock where the file system has none.
    """
    try:
        handle = os.open(place / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except FileNotFoundError:
        return None
    except OSError:
        if wanted:
            raise
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        alone = os.fstat(handle).st_nlink > 0
    except BlockingIOError:
        alone = False
    except OSError:
        alone = wanted
    if alone:
        return handle
    os.close(handle)
    return None


def _remove(folder: Path) -> None:
    try:
        shutil.rmtree(folder, ignore_errors=True)
    except BaseException:  # a signal in the middle: the work is done first, then it has its way
        shutil.rmtree(folder, ignore_errors=True)
        raise


@contextmanager
def alone_in(folders: Iterable[Path]) -> Iterator[None]:
    """Let no other run rename files in these directories at the same time; for moments only."""
    with ExitStack() as stack:
        for folder in sorted(set(folders)):
            try:
                handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            except OSError:
                continue
            stack.callback(os.close, handle)
            until = time.monotonic() + _WAIT_S
            while time.monotonic() < until:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    time.sleep(0.01)
                except OSError:  # a file system that cannot lock directories
                    break
        yield


@contextmanager
def claimed(path: Path, complaint: VtwError) -> Iterator[None]:
    """Hold the lock file ``path`` for long work; it is gone at the end, and worth nothing once its process is dead.

    Raises:
        VtwError: ``complaint``, where another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise complaint from None
        except OSError:
            break  # a file system without locks
        if os.fstat(handle).st_nlink > 0:
            break
        os.close(handle)  # its holder has just removed it
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


class Move(TypedDict):
    """A finished file or directory of a stage, and what it may replace.

    Attributes:
        name: in the stage and beside it; where the stage has none, the old file is removed.
        old: signature of the file that stands there and may go; None where there is none.
    """

    name: str
    old: Signature | None


def signature(path: Path) -> Signature | None:
    """Which file is there now; None for none."""
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return (found.st_ino, found.st_size, found.st_mtime_ns)


def announce(new: Path, moves: Sequence[Move]) -> None:
    """Note in a stage that all of it is ready: from now on ``sweep`` puts it in place instead of removing it."""
    journal = new.parent / _JOURNAL
    draft = journal.with_suffix(".tmp")
    draft.write_text(json.dumps({"moves": moves}), encoding="utf-8")
    draft.replace(journal)


def put_in_place(stages: Sequence[tuple[Path, Sequence[Move]]]) -> None:
    """Move finished files of one or several stages beside them, all or none; see ``alone_in``.

    Args:
        stages: directories that ``staged`` gave, with what is to be moved, the most important first.

    Raises:
        FileExistsError: something else stands in a file's place; nothing has changed.
    """
    done: list[tuple[Path, Path]] = []
    try:
        for new, moves in stages:
            announce(new, moves)
        for new, moves in stages:
            for move in moves:
                if _move(new, move):
                    done.append((new / move["name"], new.parent.parent / move["name"]))
    except FileExistsError:
        for made, target in reversed(done):
            if not made.exists():
                target.rename(made)
        for new, _ in stages:
            (new.parent / _JOURNAL).unlink(missing_ok=True)
        raise
    except BaseException:  # a signal: all is ready, and the rest takes a moment
        for new, _ in stages:
            _finish(new.parent)
        raise


def _move(new: Path, move: Move) -> bool:
    """Whether a new file came into a place that was free, and so could be taken back."""
    made, target, old = new / move["name"], new.parent.parent / move["name"], move["old"]
    now = signature(target)
    old = None if old is None else (old[0], old[1], old[2])
    if not os.path.lexists(made):
        if now is not None and now == old:
            target.unlink()
        return False
    if now is None:
        rename_new(made, target)
        return True
    if now != old:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    made.replace(target)
    return False


def _finish(place: Path) -> None:
    """Move what a stage holds where all of it was ready; what stands in the way by now stays."""
    try:
        moves = json.loads((place / _JOURNAL).read_text(encoding="utf-8"))["moves"]
    except (OSError, ValueError):
        return
    for move in moves:
        with suppress(OSError):
            _move(place / _NEW, move)


def rename_new(source: Path, target: Path) -> None:
    """Rename where nothing stands.

    Raises:
        FileExistsError: something does.
    """
    code = _renameat2(source, target, 1)  # RENAME_NOREPLACE
    if code == 0:
        return
    if code not in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        raise OSError(code, os.strerror(code), str(target))
    if not source.is_dir():
        try:
            os.link(source, target)
            source.unlink()
            return
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links
            pass
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    source.rename(target)


def exchange(one: Path, other: Path) -> bool:
    """Let two directories change names in one step; False where the system cannot."""
    return _renameat2(one, other, 2) == 0  # RENAME_EXCHANGE


def _renameat2(source: Path, target: Path, flags: int) -> int:
    """Linux ``renameat2``; the error's number, or 0."""
    here = -100  # AT_FDCWD
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return errno.ENOSYS
    if rename(here, os.fsencode(source), here, os.fsencode(target), flags) == 0:
        return 0
    return ctypes.get_errno()


def keep_aside(made: Sequence[Path], target: Path) -> Path:
    """Put results whose place was taken into a directory ``target-N`` that nobody has; returns it.

    Args:
        made: a finished directory, or files.
        target: the place that was taken.
    """
    number = 0
    while True:
        number += 1
        aside = target.with_name(f"{target.stem if made[0].is_file() else target.name}-{number}")
        try:
            if made[0].is_dir():
                rename_new(made[0], aside)
                return aside
            aside.mkdir()
        except FileExistsError:
            continue
        for file in made:
            shutil.move(file, aside / file.name)
        return aside
