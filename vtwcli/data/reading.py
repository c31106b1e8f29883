"""One row of a source as a sample: by a built-in task, or by the usual or the given names of columns."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

from vtwcli.data.cells import (
    IMAGE_MARK,
    BadRow,
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
from vtwcli.data.images import decode_image, squared
from vtwcli.data.rows import Rows
from vtwcli.data.sample import Sample
from vtwcli.data.spec import Columns, DataSpec
from vtwcli.data.tasks import LETTER_LINE, TASKS, TaskRow

Check = Callable[[Sample], None]


def plain_reading(spec: DataSpec) -> TaskRow:
    """How rows are read that no built-in task describes: by the usual or the given column names."""
    columns = spec.columns

    def named(row: Row, given: str | None, *usual: str) -> str:
        """The given column, else the first usual one that is there, else the first usual one."""
        return given or next((name for name in usual if name in row), usual[0])

    def choices(row: Row) -> tuple[str, ...]:
        column = columns.choices or "choices"
        absent = columns.choices is None and (missing(row.get(column)) or row[column] == [])
        return () if absent else options(row, column)

    def prompt(row: Row) -> str:
        question = text(row, columns.question or "question")
        return f"{question}\n{lettered(choices(row))}\n{LETTER_LINE}" if choices(row) else question

    def references(row: Row) -> tuple[str, ...]:
        column = named(row, columns.answer, "answer", "answers")
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
        images=lambda row: (named(row, columns.image, "image", "file_name"),),
    )


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
    within = f"hf://datasets/{rows.record['repository']}@" if rows.remote else None
    for column in reading.images(row):
        values = row[column] if isinstance(row[column], list) else [row[column]]
        images += [decode_image(value, column, rows.folder, within) for value in values]
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
        system=spec.system,
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
