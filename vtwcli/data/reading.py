"""One row of a source as a sample: by a built-in task, or by the usual or the given names of columns."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

from vtwcli.data.cells import (
    IMAGE_MARK,
    ROLES,
    BadRow,
    NoColumn,
    Row,
    fill,
    letter_of,
    lettered,
    missing,
    options,
    shown,
    text,
    texts,
)
from vtwcli.data.conversations import exchange
from vtwcli.data.images import decode_image, squared
from vtwcli.data.rows import Rows
from vtwcli.data.sample import Sample
from vtwcli.data.spec import Columns, DataSpec
from vtwcli.data.tasks import LETTER_LINE, TASKS, TaskRow

Check = Callable[[Sample], None]
_IMAGES = ("image", "images", "file_name", "file_names")
_ALIASES = {
    "image": (
        "picture",
        "pictures",
        "photo",
        "img",
        "image_path",
        "img_path",
        "path",
        "file",
        "filename",
        "url",
    ),
    "question": ("query", "prompt", "text", "instruction", "input", "problem", "sentence"),
    "answer": ("label", "response", "output", "target", "caption", "solution", "ground_truth", "gt"),
}  # names that columns have elsewhere


def plain_reading(spec: DataSpec) -> TaskRow:
    """How rows are read that no built-in task describes: by the usual or the given column names."""
    columns = spec.columns

    def choices(row: Row) -> tuple[str, ...]:
        column = columns.choices or "choices"
        absent = columns.choices is None and (missing(row.get(column)) or row[column] == [])
        return () if absent else options(row, column)

    def prompt(row: Row) -> str:
        question = text(row, columns.question or "question")
        return f"{question}\n{lettered(choices(row))}\n{LETTER_LINE}" if choices(row) else question

    def references(row: Row) -> tuple[str, ...]:
        column = _named(row, columns.answer, "answer", "answers")
        if columns.answer is None and column not in row:
            return ()  # data without labels: enough for calibration
        return (letter_of(row, column, choices(row)),) if choices(row) else texts(row, column)

    return TaskRow(
        name=Path(spec.source).stem,
        title=spec.source,
        repository=spec.source,
        config=None,
        split="",
        metric="exact_match",
        columns=Columns(question=columns.question or "question"),
        prompt=prompt,
        references=references,
        choices=choices,
        images=lambda row: _image_columns(row, columns.image),
    )


def _named(row: Row, given: str | None, *usual: str) -> str:
    """The given column, else the first usual one that is there, else the first usual one."""
    return given or next((name for name in usual if name in row), usual[0])


def _image_columns(row: Row, given: str | None) -> tuple[str, ...]:
    """The columns that hold a row's images: one, or those with numbers that are not empty."""
    if given is None and not any(name in row for name in _IMAGES):
        numbered = {int(name[1]): name[0] for key in row if (name := re.fullmatch(r"image_?(\d)", str(key)))}
        held = [numbered[number] for number in sorted(numbered) if not missing(row[numbered[number]])]
        if held:
            return tuple(held)
    return (_named(row, given, *_IMAGES),)


def _spoken(spec: DataSpec, row: Row) -> tuple[Row, str | None]:
    """A row with its conversation, if it has one, in the usual columns; and the text of its system turn.

    Raises:
        BadRow: a conversation that cannot be read, or without images.
    """
    found = exchange(row, spec.columns.question)
    if found is None:
        return row, None
    columns = spec.columns
    beside: list[Any] = []
    if columns.image or not found.images or None in found.images:
        names = [name for name in _image_columns(row, columns.image) if name in row or columns.image]
        beside = [one for name in names for one in _several(row[name]) if not missing(one)]
    pictures = found.pictures(beside)
    if not pictures:
        raise BadRow("the conversation has no image")
    asked = Row(row, **{columns.question or "question": found.question, columns.image or "image": pictures})
    if found.answer is not None and columns.answer is None:
        asked["answer"] = found.answer
    return asked, found.system


def _several(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _renamed(spec: DataSpec, row: Row) -> str | None:
    """How a row of another make can be read, if its columns' names tell; a command's option that works."""
    known = {str(name).strip().casefold(): str(name) for name in row}
    columns: dict[str, str] = {}
    for role, names in _ALIASES.items():
        usual = _IMAGES if role == "image" else (role, f"{role}s")
        if getattr(spec.columns, role) is None and not any(name in row for name in usual):
            found = next((known[name] for name in (*usual, *names) if name in known), None)
            if found is not None and found not in columns.values():
                columns[role] = found
    if "image" not in columns and _image_columns(row, spec.columns.image)[0] not in row:
        return None
    asked = spec
    if "question" not in columns and (spec.columns.question or "question") not in row and spec.prompt is None:
        if "answer" in row or "answers" in row:
            return None
        asked = spec.model_copy(update={"prompt": "Describe the picture."})
    changed = asked.written(**columns)
    return None if changed == spec.written() else f"try --data {shlex.quote(changed)}"


def sample_of(
    spec: DataSpec,
    name: str,
    reading: TaskRow,
    rows: Rows,
    check: Check | None,
    place: int,
    task: str,
    row: Row,
) -> Sample:
    """One row as a sample.

    Raises:
        BadRow: it cannot be one.
    """
    try:
        return _sample(spec, name, reading, rows, check, place, task, row)
    except NoColumn as absent:
        own = spec.source not in TASKS and absent.column in ROLES
        raise BadRow(absent.message, (_renamed(spec, row) if own else None) or absent.hint) from None


def _sample(
    spec: DataSpec,
    name: str,
    reading: TaskRow,
    rows: Rows,
    check: Check | None,
    place: int,
    task: str,
    row: Row,
) -> Sample:
    system = None
    if spec.source not in TASKS:
        row, system = _spoken(spec, row)
    for role, usual in reading.columns:
        given = getattr(spec.columns, role)
        if given is not None and usual is not None and given != usual:
            row = Row(row, **{usual: row[given]})
    choices = reading.choices(row)
    if spec.prompt is None:
        prompt = reading.prompt(row)
    else:
        prompt = fill(spec.prompt, row, reading.columns.question or "question", choices)
    images = []
    folder = Path(spec.folder).expanduser() if spec.folder else rows.folder
    within = f"hf://datasets/{rows.record['repository']}@" if rows.remote else None
    for column in reading.images(row):
        images += [decode_image(value, column, folder, within) for value in _several(row[column])]
    if spec.image == "pad":
        images = [squared(image) for image in images]
    prompt, places = _placed(prompt, len(images))
    references = reading.references(row)
    metric = spec.metric or (
        "multiple_choice" if choices and reading.metric == "exact_match" else reading.metric
    )
    if metric in ("pope", "pope_exact", "mme") and any(
        one.strip().lower() not in ("yes", "no") for one in references
    ):
        raise BadRow(f"the metric {metric} judges yes and no, but the answer is {shown(references[0])}")
    split = rows.record.get("split")
    identity = row["id"] if spec.source == "demo" else place
    sample = Sample(
        id=":".join(str(part) for part in (name, split, identity) if part is not None),
        task=task,
        images=tuple(images),
        prompt=prompt,
        references=references,
        metric=metric,
        choices=choices,
        meta={name: row[name] for name in reading.meta} | ({} if spec.source in TASKS else {"own": True}),
        places=places,
        system=spec.system or system,
        longest=reading.longest,
    )
    if check is not None:
        check(sample)
    return sample


def _placed(prompt: str, images: int) -> tuple[str, tuple[int, ...]]:
    """A prompt without its marks of images, and where they were (``Sample.places``).

    Raises:
        BadRow: there are marks, but not one for each image.
    """
    pieces = prompt.split(IMAGE_MARK)
    marks = len(pieces) - 1
    if marks not in (0, images):
        raise BadRow(
            f"the prompt has {marks} marks {IMAGE_MARK}, but the row has {images} images: "
            "write one for each image, or none"
        )
    if not any(piece.strip() for piece in pieces[:-1]):
        return (pieces[-1].strip() if marks else prompt), ()
    return "".join(pieces), tuple(accumulate(map(len, pieces[:-1])))
