"""Cells of a table's row as text, lists and choices, and what is said of those that are none."""

from __future__ import annotations

import ast
import math
import re
import string
from collections.abc import Iterable, Sequence
from decimal import Decimal
from typing import Any

from vtwcli.data.spec import Columns
from vtwcli.errors import VtwError
from vtwcli.io.documents import nearest

LETTERS = string.ascii_uppercase
IMAGE_MARK = "<image>"  # where a prompt shows an image

ROLES = {name: name for name in Columns.model_fields} | {
    "file_name": "image",
    "answers": "answer",
    "caption": "answer",
    "options": "choices",
}  # which option names another column


class BadRow(VtwError):
    """A row that cannot become a sample; the source adds its place, or skips it."""


class NoColumn(BadRow):
    """A row without a column that is read, ``column``."""

    def __init__(self, message: str, hint: str | None, column: str) -> None:
        super().__init__(message, hint)
        self.column = column


class Row(dict[str, Any]):
    """One row of a data set; a column that is not there is a ``BadRow`` that names those that are."""

    def __missing__(self, column: str) -> Any:
        present = [str(name) for name in self]
        hint: str | None
        if column in ROLES:
            hint = f"name another one with columns.{ROLES[column]}=COLUMN"
        else:
            close = nearest(column, present)
            hint = f"did you mean {close!r}?" if close else None
        raise NoColumn(f"no column {column!r}; columns: {listed(present) or 'none'}", hint, column)


def shown(value: Any, most: int = 80) -> str:
    """A value for a message: on one line, and what is long only by its beginning."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"


def listed(names: Iterable[str], most: int = 300) -> str:
    """Names for a message, with commas; of many or long ones the first."""
    text = ", ".join(names)
    return text if len(text) <= most else f"{text[:most]}..."


def missing(value: Any) -> bool:
    """Whether a cell holds nothing: None, no text, or NaN, which is what tables of numbers put there."""
    return value is None or value == "" or (isinstance(value, float | Decimal) and math.isnan(value))


def _written(value: Any, column: str) -> str:
    """Text or a number as text; whole numbers have no point, as tables with a gap make floats of them."""
    if isinstance(value, float | Decimal):
        if not math.isfinite(value):
            raise BadRow(f"column {column!r} holds {value}, not a number")
        return str(int(value)) if value == int(value) and abs(int(value)) < 10**16 else str(value)
    if isinstance(value, int):
        return str(value)
    if not isinstance(value, str):
        raise BadRow(f"column {column!r} holds a {type(value).__name__}, not text")
    if re.search("[\ud800-\udfff]", value):
        raise BadRow(f"column {column!r} holds {shown(value)}, which is not text in UTF-8")
    return value


def text(row: Row, column: str) -> str:
    """A column that must hold text; numbers are written out.

    Raises:
        BadRow: the column is missing, empty, of another kind, or holds halves of surrogate pairs.
    """
    value = row[column]
    if missing(value):
        raise BadRow(f"column {column!r} is empty")
    return _written(value, column)


def texts(row: Row, column: str) -> tuple[str, ...]:
    """A column that holds one text or several; some of several may be empty, but not all.

    VQA's own form, a list of records with an ``answer`` each, is read too. NaN is no answer.
    """
    value = row[column]
    if isinstance(value, dict) and "answer" in value:
        value = value["answer"]
    if not isinstance(value, list | tuple):
        return (text(Row({column: value}), column),)
    found = []
    for one in value:
        answer = one["answer"] if isinstance(one, dict) and "answer" in one else one
        if not isinstance(answer, str | int | float | Decimal):
            raise BadRow(f"column {column!r} holds a {type(answer).__name__} among its texts")
        if answer == "" or not missing(answer):
            found.append(_written(answer, column))
    if not any(one.strip() for one in found):
        raise BadRow(f"column {column!r} is empty")
    return tuple(found)


def options(row: Row, column: str) -> tuple[str, ...]:
    """A column that holds a list of options, or a string that writes one down as in MMMU and in CSV files."""
    value = row[column]
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            value = None
    if not isinstance(value, list | tuple) or not value:
        raise BadRow(f"column {column!r} is not a list of choices")
    if len(value) > len(LETTERS):
        raise BadRow(f"column {column!r} has {len(value)} choices; at most {len(LETTERS)} have a letter")
    return tuple(_written(one, column) for one in value)


def lettered(choices: Sequence[str]) -> str:
    """One line ``A. text`` per choice."""
    return "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False))


def letter_at(row: Row, column: str, choices: Sequence[str]) -> str:
    """The letter of the choice whose 0-based place the column holds, as a number or as digits."""
    value = row[column]
    try:
        place = int(value)
        if place != value and not isinstance(value, str):
            raise ValueError("between two places")
    except (TypeError, ValueError, OverflowError):
        raise BadRow(f"column {column!r} holds {shown(value)}, not the place of a choice") from None
    if not 0 <= place < len(choices):
        raise BadRow(f"column {column!r} holds {place}, but there are {len(choices)} choices")
    return LETTERS[place]


def letter_of(row: Row, column: str, choices: Sequence[str]) -> str:
    """The letter of the right choice, however the column names it: as text, as a letter or as a 0-based place."""
    value = row[column]
    if missing(value):
        raise BadRow(f"column {column!r} is empty")
    if isinstance(value, float | Decimal):
        value = _written(value, column)
    said = str(value).strip().casefold()
    by_text = {choice.strip().casefold(): letter for letter, choice in zip(LETTERS, choices, strict=False)}
    by_letter = {letter.casefold(): letter for letter in LETTERS[: len(choices)]}
    for accepted in (by_text, by_letter):
        if said in accepted:
            return accepted[said]
    if isinstance(value, str) and not said.isdecimal():
        raise BadRow(f"column {column!r} holds {shown(value)}, which is none of the choices")
    return letter_at(Row({column: value}), column, choices)


def fill(template: str, row: Row, question: str, choices: Sequence[str]) -> str:
    """Put a row into a prompt template.

    Args:
        template: text with ``{question}``, ``{choices}`` (lettered lines) or ``{COLUMN}`` of any column; a list is
            written with commas.
        row: the row.
        question: name of its question column.
        choices: its options.

    Raises:
        BadRow: the template names a column that is not there.
    """

    def value(name: re.Match[str]) -> str:
        if name[1] == "choices":
            return lettered(choices)
        column = question if name[1] == "question" else name[1]
        return ", ".join(texts(row, column)) if isinstance(row[column], list) else text(row, column)

    return re.sub(r"\{(\w+)\}", value, template)
