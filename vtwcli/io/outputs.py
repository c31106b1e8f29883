"""The files of one result: where they go, what they may replace, and how they appear together.

``--force`` replaces what this tool wrote, each file by one of its kind, and never what a command reads.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from vtwcli.errors import UsageError, VtwError
from vtwcli.io import console, files, staging

MARK = "vtwcli"
"""How pictures and pages name their maker."""
GENERATOR = f'<meta name="generator" content="{MARK}">'
FOOTER = f"<!-- {MARK} -->\n"
"""The last line of Markdown that may be replaced."""
RECIPE = (
    "# A recipe: vtw run FILE does all of it, vtw recipe check FILE says whether it is valid, and the single "
    "commands read"
)
"""The first line of a recipe that ``vtw recipe init`` wrote."""
_HEAD = 4096  # bytes; what tells a kind stands in the first ones

Inputs = Sequence[tuple[str, Path]]
"""What a command reads, by what it is called in messages ("the model", "the data")."""

# what goes beside a result, by the name under which its writer knows it
_KINDS = {
    "schedule": "schedule",
    "static": "schedule",
    "dynamic": "schedule",
    "stages": "schedule",
    "plot": "picture",
    "kl": "picture",
    "attention": "picture",
    "tokens": "picture",
    "values": "picture",
    "page": "page",
    "markdown": "tables",
    "trace": "trace",
}


def is_ours(path: Path, kind: str) -> bool:
    """Whether a file is a document of a kind, as this tool writes it.

    Args:
        kind: ``schedule``, ``picture``, ``page``, ``tables``, ``trace``, ``recipe``, or the ``format`` of a JSON
            document.
    """
    try:
        if path.is_symlink() or not files.regular(path).is_file():
            return False
        return _is_kind(path, kind)
    except (OSError, ValueError, RecursionError, VtwError):
        return False


def _is_kind(path: Path, kind: str) -> bool:
    with path.open("rb") as stream:
        head = stream.read(_HEAD)
    if kind == "picture":
        marks = {
            ".png": b"tEXtSoftware\0" + MARK.encode(),
            ".svg": f"<dc:title>{MARK}</dc:title>".encode(),
        }
        if path.suffix == ".pdf":
            return head.startswith(b"%PDF") and f"/Creator ({MARK})".encode() in path.read_bytes()
        return path.suffix in marks and marks[path.suffix] in head
    if kind == "page":
        return GENERATOR.encode() in head
    if kind == "tables":
        return path.read_bytes().endswith(FOOTER.encode())
    if kind == "trace":
        with path.open(encoding="utf-8") as lines:
            first = json.loads(lines.readline())
        return isinstance(first, dict) and {"id", "task", "schedule", "visual_per_layer"} <= first.keys()
    if kind == "recipe":
        return head.startswith(RECIPE.encode())
    if kind == "schedule":
        from vtwcli.io import documents

        found = documents.plain(documents.read(path, "schedule"))
        return isinstance(found, dict) and "actions" in found and MARK in found.get("provenance", ())
    found = json.loads(path.read_text(encoding="utf-8"))
    return isinstance(found, dict) and found.get("format") == kind


class Outputs(dict[str, Path | None]):
    """Where the files of one result go, by ``result`` and the names of what is beside it; None where nowhere.

    Attributes:
        kind: of the result; the ``format`` of its document, or as for ``is_ours``.
        force: files of the same kinds may be replaced.
        owned: files that may be replaced whatever is in them.
    """

    def __init__(
        self,
        places: Mapping[str, Path | None],
        kind: str,
        force: bool = False,
        owned: Collection[Path] = (),
    ) -> None:
        super().__init__(places)
        self.kind, self.force, self.owned = kind, force, frozenset(owned)

    def kind_of(self, key: str) -> str:
        """The kind of one of the files."""
        return self.kind if key == "result" else _KINDS[key]

    def check(self, inputs: Inputs) -> None:
        """Refuse, before long work, what could not be written at its end.

        Raises:
            UsageError: a file exists and may not be replaced, is an input, has no place, or two have the same.
        """
        seen: dict[Path, str] = {}
        for key, path in self.items():
            if path is None:
                continue
            place = _plain(path)
            if place in seen:
                raise UsageError(
                    f"{path} cannot be both the {seen[place]} and the {key}", "give them different names"
                )
            seen[place] = key
            files.present(path)  # a name that no file can have
            staging.sweep(place)
            if path.is_dir():
                raise UsageError(f"{path} is a directory, not a file")
            check_no_input(path, inputs)
            if files.present(path):
                self._check_replaceable(key, path)
            files.check_folder(path)

    def _check_replaceable(self, key: str, path: Path) -> None:
        if path in self.owned:
            return
        if not self.force:
            raise UsageError(f"{path} exists already", "choose another name, or --force to replace it")
        if path.is_symlink():
            raise UsageError(
                f"{path} is a link, which --force does not replace", "choose another name, or remove it"
            )
        if not is_ours(path, self.kind_of(key)):
            raise UsageError(
                f"{path} is not a {_NAMES.get(self.kind_of(key), 'result of this command')} that vtw wrote, so "
                "--force does not replace it",
                "choose another name, or move it away",
            )

    @contextmanager
    def publish(self) -> Iterator[Together]:
        """Make the files; they appear when the block ends well, all of them, and nothing changes otherwise.

        Raises:
            UsageError: a place was taken meanwhile; the files are kept in a directory that the message names.
            VtwError: the file system refuses.
        """
        asked = {key: path.absolute() for key, path in self.items() if path is not None}
        try:
            with ExitStack() as stack:
                stages: dict[Path, Path] = {}
                for path in asked.values():
                    if path.parent not in stages:
                        stages[path.parent] = stack.enter_context(staging.staged(path))
                made = Together({key: stages[path.parent] / path.name for key, path in asked.items()}, self)
                yield made
                with staging.alone_in(stages):
                    taken = self._put(asked, stages)
                if taken is not None:
                    finished = [place for place in made.places.values() if place.exists()]
                    aside = staging.keep_aside(finished, next(iter(asked.values())))
                    shown = os.path.relpath(aside) if not taken.is_absolute() else aside
                    raise UsageError(
                        f"{taken} exists by now, though it did not when the work began",
                        f"this result is kept in {shown}",
                    )
        except OSError as error:
            raise files.cannot_write(next(path for path in self.values() if path), error) from None

    def _put(self, asked: Mapping[str, Path], stages: Mapping[Path, Path]) -> Path | None:
        """Put everything in place; the path that was taken meanwhile, if one was."""
        moves: dict[Path, list[staging.Move]] = {folder: [] for folder in stages}
        for key, path in asked.items():
            given = self[key] or path
            made = (stages[path.parent] / path.name).exists()
            old = staging.signature(path)
            if old is not None:
                try:
                    self._check_replaceable(key, given)
                except UsageError:
                    if made:
                        return given
                    continue  # nothing is to stand there, and what does is somebody else's
            moves[path.parent].append({"name": path.name, "old": old})
        try:
            staging.put_in_place([(stages[folder], some) for folder, some in moves.items()])
        except FileExistsError as error:
            return Path(error.filename2 or error.filename or next(iter(asked.values())))
        return None


_NAMES = {
    "schedule": "schedule",
    "picture": "picture",
    "page": "page",
    "tables": "Markdown file",
    "trace": "trace",
    "recipe": "recipe",
}


class Together:
    """The files of one result while they are made; what is not made is removed where an old one stands.

    Attributes:
        places: where each is made.
    """

    def __init__(self, places: Mapping[str, Path], outputs: Outputs) -> None:
        self.places, self._outputs = places, outputs

    def text(self, key: str, text: str) -> None:
        """Make a file of text, if it is wanted."""
        if key in self.places:
            self.places[key].write_text(text, encoding="utf-8", errors=console.ESCAPE)

    def view(self, key: str, make: Callable[[Path], object]) -> None:
        """Make a picture or a page of what is in the document, if it is wanted; one that fails costs a warning."""
        if key not in self.places:
            return
        place = self.places[key]
        done = False
        with console.not_worth_failing(
            f"{self._outputs[key]}: cannot be made, the result is written without it"
        ):
            make(place)
            done = True
        if not done:
            place.unlink(missing_ok=True)

    def text_view(self, key: str, make: Callable[[], str]) -> None:
        """Like ``view``, for text."""
        self.view(key, lambda _: self.text(key, make()))


def check_no_input(path: Path, inputs: Inputs) -> None:
    """Refuse a file that a command reads, under whatever name, as one that it writes.

    Raises:
        UsageError: it is an input, or lies in the model.
    """
    for name, source in inputs:
        if same_file(path, source):
            raise UsageError(f"{path} is {name} itself", "choose another name for the output")
        if name in WHOLE and _holds(source, path):
            raise UsageError(f"{path} is part of {name}", "choose another name for the output")


WHOLE = ("the model", "the baseline")
"""Directories of which every file is an input."""


def check_holds_no_input(target: Path, inputs: Inputs) -> None:
    """Refuse a directory that is, or holds, what a command reads or where it runs.

    Raises:
        UsageError: it does.
    """
    for name, source in (*inputs, ("the working directory", Path.cwd())):
        if _holds(target, source):
            raise UsageError(f"{target} holds {name} itself", "choose another output directory")


def same_file(one: Path, other: Path) -> bool:
    """Whether two names lead to one file: links of both kinds and blind case included."""
    try:
        return one.samefile(other)
    except (OSError, ValueError):
        return False


def _plain(path: Path) -> Path:
    """The absolute path without ``..``; links stay."""
    return Path(os.path.normpath(path.absolute()))


def _holds(folder: Path, path: Path) -> bool:
    """Whether a directory is ``path``, or one of the directories above it by name or behind links."""
    ways = {_plain(path), path.resolve()}
    return any(same_file(folder, place) for way in ways for place in (way, *way.parents))


def inputs_of(named: Mapping[str, Any]) -> list[tuple[str, Path]]:
    """The inputs that are on this machine.

    Args:
        named: what each is called, and a path, a name that may be one, or several.
    """
    found = []
    for name, values in named.items():
        for value in values if isinstance(values, list | tuple) else [values]:
            if value is None or value == "":
                continue
            if name in WHOLE and value == "demo":
                from vtwcli.io.files import demo_model

                value = demo_model()
            path = Path(value).expanduser()
            if same_file(path, path):
                found.append((name, path))
    return found
