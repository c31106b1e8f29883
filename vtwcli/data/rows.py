"""Rows of a single file, read as a stream and as they are written: text stays text, in CSV too."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from vtwcli.data.cells import BadRow, Row, shown
from vtwcli.errors import NotFoundError, first_line
from vtwcli.io.files import regular

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".tsv")
CELL = 64 << 20  # characters of a table's cell; pictures in base64 have millions
LONGEST_REASON = 300  # characters of a library's message


@dataclass(frozen=True)
class Rows:
    """The rows of one split, in the order in which they are stored.

    Attributes:
        rows: the rows; a row that could not be read is a ``BadRow`` in its place.
        where: names the source in messages.
        folder: where relative image paths begin.
        remote: whether reading on costs traffic.
        record: what was read, for result files.
    """

    rows: Iterator[Row | BadRow]
    where: str
    folder: Path | None
    remote: bool
    record: dict[str, Any]


# Files are opened so that bytes which are no UTF-8 become lone surrogates: they cost their row, not the file.
_AS_READ = {"encoding": "utf-8-sig", "errors": "surrogateescape"}


def _undecoded(text: str) -> bool:
    """Whether text read with ``_AS_READ`` held bytes that are not UTF-8."""
    return not text.isascii() and any("\udc80" <= letter <= "\udcff" for letter in text)


class _Ambiguous(dict[str, Any]):
    """A JSON object with two equal names, of which nobody knows which is meant."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    return found if len(found) == len(pairs) else _Ambiguous(found)


def _row(value: Any, what: str) -> Row | BadRow:
    if not isinstance(value, dict):
        return BadRow(f"{what} is not a JSON object")
    return BadRow(f"{what} has one name twice") if isinstance(value, _Ambiguous) else Row(value)


def _json_lines(path: Path) -> Iterator[Row | BadRow]:
    with path.open(**_AS_READ) as stream:  # type: ignore[call-overload]
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            if _undecoded(line):
                yield BadRow(f"line {number} is not text in UTF-8")
                continue
            try:
                value = json.loads(line, object_pairs_hook=_object)
            except (ValueError, RecursionError) as error:
                yield BadRow(f"line {number} is not JSON: {first_line(error)[:LONGEST_REASON]}")
                continue
            yield _row(value, f"line {number}")


def _json(path: Path) -> Iterator[Row | BadRow]:
    value = json.loads(path.read_text(**_AS_READ), object_pairs_hook=_object)
    if isinstance(value, dict):  # {"data": [...]}, whatever the key
        lists = [entry for entry in value.values() if isinstance(entry, list)]
        value = lists[0] if len(lists) == 1 else value
    if not isinstance(value, list):
        raise ValueError("it is not a list of objects")
    for entry in value:
        yield _row(entry, "it")


def _table(path: Path) -> Iterator[Row | BadRow]:
    csv.field_size_limit(max(CELL, csv.field_size_limit()))
    with path.open(newline="", **_AS_READ) as stream:  # type: ignore[call-overload]
        reader = csv.reader(stream, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        header = next(reader, [])
        if twice := [name for name in header if name and header.count(name) > 1]:
            raise ValueError(f"its header names the column {shown(twice[0])} twice")
        while True:
            try:
                values = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield BadRow(
                    f"line {reader.line_num} is not a row of a table: {first_line(error)[:LONGEST_REASON]}"
                )
                continue
            if not values:
                continue
            if len(values) > len(header):
                yield BadRow(f"line {reader.line_num} has more fields than the header")
            elif any(map(_undecoded, values)):
                yield BadRow(f"line {reader.line_num} is not text in UTF-8")
            else:
                yield Row(zip(header, values + [None] * (len(header) - len(values)), strict=True))


def label_name(names: Sequence[str], value: Any) -> Any:
    """A class label's name; no label, None or -1, stays what it is."""
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else value


def parquet_rows(source: Path | BinaryIO) -> Iterator[Row | BadRow]:
    """Rows of a Parquet file, class labels by name; one row group is read at a time, and only when it is needed.

    No read-ahead and no threads: those of Arrow's scanner fetch much more than was asked for, and a thread that
    still reads when the process ends can block its exit for good (https://github.com/apache/arrow/issues/45214).
    """
    import numpy
    import pyarrow.parquet as parquet

    with parquet.ParquetFile(source, pre_buffer=False) as file:
        described = json.loads((file.schema_arrow.metadata or {}).get(b"huggingface", b"{}"))
        features = described.get("info", {}).get("features", {})
        labels = {name: one["names"] for name, one in features.items() if "names" in one}
        columns = file.schema_arrow.names
        if twice := [name for name in columns if columns.count(name) > 1]:
            raise ValueError(f"it has the column {shown(twice[0])} twice")
        short = [field.name for field in file.schema_arrow if str(field.type) == "float"]
        for group in range(file.num_row_groups):
            for batch in file.iter_batches(batch_size=16, row_groups=[group], use_threads=False):
                for place in range(batch.num_rows):
                    try:
                        (values,) = batch.slice(place, 1).to_pylist()
                    except UnicodeDecodeError:
                        yield BadRow("it holds bytes that are not text in UTF-8")
                        continue
                    for name in short:  # 0.1 of 32 bits is meant as 0.1, not as 0.10000000149
                        if values[name] is not None:
                            values[name] = float(str(numpy.float32(values[name])))
                    yield Row(
                        values, **{name: label_name(names, values[name]) for name, names in labels.items()}
                    )


_READERS = {".jsonl": _json_lines, ".json": _json, ".parquet": parquet_rows, ".csv": _table, ".tsv": _table}


def guarded(rows: Iterable[Row | BadRow], where: str) -> Iterator[Row | BadRow]:
    """Turn whatever a reader raises into one line; file formats and networks raise too many types to list."""
    try:
        yield from rows
    except Exception as error:
        raise NotFoundError(f"{where}: cannot be read: {first_line(error)[:LONGEST_REASON]}") from error


def open_file(path: Path, split: str | None = None) -> Rows:
    """Rows of a file of one of ``SUFFIXES``; ``split`` is what the record calls it.

    Raises:
        NotFoundError: unknown by its name, or unreadable.
    """
    suffix = path.suffix.lower()
    if suffix not in _READERS:
        raise NotFoundError(f"{path}: unknown kind of data file {suffix!r}", f"known: {', '.join(SUFFIXES)}")
    try:
        regular(path)
    except OSError as error:
        raise NotFoundError(f"{path}: cannot be read: {error.strerror}") from None
    rows = guarded(_READERS[suffix](path), str(path))
    return Rows(rows, str(path), path.parent, False, {"path": str(path), "split": split})
