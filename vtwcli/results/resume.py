"""Finished samples of an interrupted run, kept in a file beside its result until the result is there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vtwcli.io import console, files
from vtwcli.machine import distributed

Store = Callable[[int, Any], None]
_FORMAT = "entries by content"  # files of another form belong to other inputs


def key_of(*parts: Any) -> str:
    """What kept samples depend on, as a digest; another key makes them worthless."""
    return hashlib.sha256(json.dumps([_FORMAT, *parts], sort_keys=True, default=str).encode()).hexdigest()


def stamp(folder: Path) -> list[tuple[str, int, int]]:
    """Names, sizes and times of a model directory's files, so that a changed model has another key."""
    files = sorted(file for file in folder.iterdir() if file.is_file())
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]


@contextmanager
def kept(
    state: Path | None, key: str, contents: Sequence[str], what: str = "samples"
) -> Iterator[tuple[dict[int, Any], Store]]:
    """Yield what an interrupted run finished, by place, and a function that keeps one more.

    Each process writes a file of its own, with one JSON line per sample behind a line with the key; a torn last line
    is ignored. A line names its sample's content and not its place: a row that was edited is computed again, and rows
    in another order keep their own. All processes read the files of all, so that a run may go on with another number
    of them. When the block ends well the files are gone; after an exception they stay.

    Args:
        state: names the files; None keeps nothing.
        key: see ``key_of``; of everything but the samples.
        contents: by place, a digest of what the sample's entry depends on.
        what: what the places are called, if not samples.
    """
    if state is None:
        yield {}, lambda place, entry: None
        return
    mine = _file(state, distributed.rank())
    known: dict[str, Any] = {}
    earlier: set[str] = set()
    others = 0
    wanted = set(contents)
    for file in _files(state):
        entries = _read(file, key)
        if entries is None:
            others += 1
        else:
            others += bool(entries.keys() - wanted)
            entries = {content: entry for content, entry in entries.items() if content in wanted}
            known |= entries
            if distributed.size() == 1 or _written_before(file):  # not by another process of this run
                earlier |= set(entries)
    if earlier:
        done = sum(content in earlier for content in contents)
        console.note(f"resuming: {done} {what} are done already")
    elif others:
        console.note("the interrupted run had other inputs; starting anew")
    files.write_text(mine, "\n".join([key, *(_line(*entry) for entry in known.items())]) + "\n")
    with mine.open("a", encoding="utf-8") as stream:

        def keep(place: int, entry: Any) -> None:
            stream.write(_line(contents[place], entry) + "\n")
            stream.flush()

        yield {place: known[content] for place, content in enumerate(contents) if content in known}, keep
    mine.unlink(missing_ok=True)
    if distributed.is_main():
        for file in _files(state):  # of processes that this run no longer has
            if int(file.suffix[1:]) >= distributed.size():
                file.unlink(missing_ok=True)


def _file(state: Path, rank: int) -> Path:
    return state.with_name(f".{state.name}.{rank}")


def _files(state: Path) -> list[Path]:
    found = state.parent.glob(f".{state.name}.*") if state.parent.is_dir() else iter(())
    return sorted(file for file in found if file.suffix[1:].isdigit())


def _written_before(file: Path) -> bool:
    """Whether a file is older than this process."""
    import psutil

    try:
        return file.stat().st_mtime < float(psutil.Process().create_time())
    except OSError:  # its process has finished
        return False


def _line(content: str, entry: Any) -> str:
    return json.dumps([content, entry])


def _read(file: Path, key: str) -> dict[str, Any] | None:
    """The entries of one file by content, or None where they belong to other inputs."""
    try:
        first, *lines = files.regular(file).read_text(encoding="utf-8").splitlines() or [""]
    except OSError:  # another process put a new one in its place
        return {}
    if first != key:
        return None
    entries: dict[str, Any] = {}
    for line in lines:
        try:
            content, entry = json.loads(line)
        except ValueError:
            break
        entries[content] = entry
    return entries
