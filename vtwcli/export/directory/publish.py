"""Puts a finished directory in its place in one step, so that nobody ever sees half of one."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vtwcli.errors import UsageError
from vtwcli.export.directory.manifest import MANIFEST
from vtwcli.io import files, staging
from vtwcli.io.outputs import Inputs, check_holds_no_input
from vtwcli.io.staging import exchange


def check_target(target: Path, force: bool, inputs: Inputs = ()) -> None:
    """Refuse, before long work, a target that could not be published.

    Args:
        target: the directory to make.
        force: replace a directory that ``vtw export`` made, if nothing else is in it.
        inputs: what is read to make it.

    Raises:
        UsageError: the target is a file or a link, holds an input or the working directory, exists and is not to be
            or must not be replaced, or its parent cannot be written.
    """
    if files.present(target):
        if target.is_symlink() or not target.is_dir():
            raise UsageError(f"{target} exists and is not a directory", "choose another name")
        check_holds_no_input(target, inputs)
        if not force:
            raise UsageError(f"{target} exists already", "choose another name, or --force to replace it")
        _check_replaceable(target)
    files.check_folder(target)


def _check_replaceable(target: Path) -> None:
    """Refuse a directory with anything in it that its own manifest does not list.

    Raises:
        UsageError: names the first stranger.
    """
    hint = "move it away, or choose another name"
    try:
        names = sorted(path.name for path in target.iterdir())
        if not names:
            return
        listed = _listed(target)
        if listed is None:
            raise UsageError(
                f"{target} holds {names[0]} and no {MANIFEST} of vtw export, so --force does not replace it",
                hint,
            )
        for place, folders, found in os.walk(target, onerror=_raise):
            below = Path(place).relative_to(target)
            for name in sorted([*folders, *found]):
                path = below / name
                if not _is_listed(target, path, listed):
                    raise UsageError(
                        f"{target} holds {path}, which its {MANIFEST} does not list, so --force does not replace it",
                        hint,
                    )
    except OSError as error:
        raise UsageError(f"{target} cannot be looked through: {error.strerror or error}", hint) from None


def _listed(target: Path) -> set[str] | None:
    """The files of an exported directory by its manifest, which it lists too; None without one of ours."""
    file = target / MANIFEST
    try:
        if file.is_symlink():
            return None
        manifest = json.loads(files.regular(file).read_text(encoding="utf-8"))
        if not str(manifest["format"]).startswith("vtw-"):
            return None
        return {MANIFEST, *manifest["files"]}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _is_listed(target: Path, path: Path, listed: set[str]) -> bool:
    """Whether a file is listed, or a directory is on the way to one; what Python compiled of a listed file is too."""
    place = target / path
    if place.is_symlink():
        return False
    if place.is_dir():
        return path.name == "__pycache__" or any(Path(name).is_relative_to(path) for name in listed)
    if path.parent.name == "__pycache__" and path.suffix == ".pyc":
        return str(path.parent.parent / f"{path.name.partition('.')[0]}.py") in listed
    return place.is_file() and str(path) in listed


def _raise(error: OSError) -> None:
    raise error


@contextmanager
def publish(target: Path, force: bool, inputs: Inputs = ()) -> Iterator[Path]:
    """Yield a temporary directory of the same name and rename it to ``target`` when the block ends well.

    After an exception, Ctrl-C and SIGTERM included, the temporary directory is gone and ``target`` is as it was. An
    existing directory is replaced only with ``force``, and only when the new one is complete. Where another process
    took the place meanwhile, the new directory is kept under another name.

    Args:
        target: the directory to make.
        force: replace an existing directory, see ``check_target``.
        inputs: what is read to make it.

    Raises:
        UsageError: see ``check_target``; or the place was taken meanwhile, and the message says what is where.
        VtwError: the file system refuses.
    """
    with aside(target, force, inputs) as made:
        made.mkdir()
        yield made


@contextmanager
def aside(target: Path, force: bool, inputs: Inputs = ()) -> Iterator[Path]:
    """``publish`` for what makes the directory itself: a name like ``target``'s, at which there is nothing yet."""
    target = target.absolute()
    staging.sweep(target)
    check_target(target, force, inputs)
    try:
        with staging.staged(target) as new:
            made = new / target.name
            yield made
            with staging.alone_in([target.parent]):
                _move(made, target, force, inputs)
    except OSError as error:
        raise files.cannot_write(target, error) from error


def _move(made: Path, target: Path, force: bool, inputs: Inputs) -> None:
    try:
        if os.path.lexists(target):
            check_target(target, force, inputs)
            if exchange(made, target):
                return  # the old directory now stands where the new one was made, and goes with it
            # Where two directories cannot change places, the old one steps aside and comes back if the rename fails.
            _step_aside(made, target)
        else:
            staging.rename_new(made, target)
    except (FileExistsError, UsageError) as error:
        aside = staging.keep_aside([made], target)
        reason = error.message if isinstance(error, UsageError) else f"{target} exists already"
        raise UsageError(
            f"{reason}; it was made while this command was at work", f"its own result is kept in {aside}"
        ) from None


def _step_aside(made: Path, target: Path) -> None:
    old = made.parent.parent / "old"
    moves: list[staging.Move] = [{"name": made.name, "old": None}]
    staging.announce(
        made.parent, moves
    )  # killed behind the next line, the new one is what the next run finds
    target.rename(old)
    try:
        staging.put_in_place([(made.parent, moves)])
    except BaseException:
        if not target.exists():
            old.rename(target)
        raise
