"""Where rows come from: a local file, a local directory, or a data set on the Hub, read as a stream.

Single files are read as they are written (text stays text, in CSV too); directories and Hub data sets through
``datasets``. Images stay encoded, so that only chosen rows are decoded.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from vtwcli.data.cells import BadRow, Row, listed, shown
from vtwcli.data.tasks import ORGANISATIONS
from vtwcli.errors import NotFoundError, first_line
from vtwcli.io.documents import nearest
from vtwcli.io.files import regular

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".tsv")
CELL = 64 << 20  # characters of a table's cell; pictures in base64 have millions
LONGEST_REASON = 300  # characters of a library's message
_SPLITS = ("test", "validation", "train")  # which split is read when nothing says so


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


# --- files -----------------------------------------------------------------------------------------------


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


def _label(names: Sequence[str], value: Any) -> Any:
    """A class label's name; no label, None or -1, stays what it is."""
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else value


def _parquet(source: Path | BinaryIO) -> Iterator[Row | BadRow]:
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
                    yield Row(values, **{name: _label(names, values[name]) for name, names in labels.items()})


_READERS = {".jsonl": _json_lines, ".json": _json, ".parquet": _parquet, ".csv": _table, ".tsv": _table}


def _guarded(rows: Iterable[Row | BadRow], where: str) -> Iterator[Row | BadRow]:
    """Turn whatever a reader raises into one line; file formats and networks raise too many types to list."""
    try:
        yield from rows
    except Exception as error:
        raise NotFoundError(f"{where}: cannot be read: {first_line(error)[:LONGEST_REASON]}") from error


def _file(path: Path, split: str | None = None) -> Rows:
    suffix = path.suffix.lower()
    if suffix not in _READERS:
        raise NotFoundError(f"{path}: unknown kind of data file {suffix!r}", f"known: {', '.join(SUFFIXES)}")
    try:
        regular(path)
    except OSError as error:
        raise NotFoundError(f"{path}: cannot be read: {error.strerror}") from None
    rows = _guarded(_READERS[suffix](path), str(path))
    return Rows(rows, str(path), path.parent, False, {"path": str(path), "split": split})


# --- directories and the Hub -----------------------------------------------------------------------------


def _pick_split(available: Sequence[str], wanted: str | None, default: str | None, where: str) -> str:
    """The wanted split, else the only one, else the default one, else the first of ``_SPLITS``."""
    if wanted is None and len(available) > 1:
        wanted = default
    if wanted is None:
        return next((name for name in _SPLITS if name in available), available[0])
    if wanted not in available:
        close = nearest(wanted, available)
        hint = f"did you mean {close!r}?" if close else None
        raise NotFoundError(f"{where}: no split {wanted!r}; splits: {listed(available)}", hint)
    return wanted


def _streamed(data: Any) -> Iterator[Row | BadRow]:
    """Rows of a ``datasets`` stream, images as stored and class labels by name."""
    from datasets import ClassLabel

    features = data.features or {}
    labels = {name: feature.names for name, feature in features.items() if isinstance(feature, ClassLabel)}
    for values in data.decode(False):
        yield Row(values, **{name: _label(names, values[name]) for name, names in labels.items()})


def _parquet_files(files: Sequence[str]) -> Iterator[Row | BadRow]:
    from huggingface_hub import HfFileSystem

    for file in files:
        if file.startswith("hf://"):
            with HfFileSystem().open(file, "rb", block_size=2**20) as stream:
                yield from _parquet(stream)
        else:
            yield from _parquet(Path(file))


def _splits(builder: Any) -> dict[str, Iterator[Row | BadRow]]:
    """The rows of each split of a ``datasets`` builder; nothing is read yet."""
    files = {
        str(name): [str(file) for file in some] for name, some in (builder.config.data_files or {}).items()
    }
    if files and all(file.endswith(".parquet") for some in files.values() for file in some):
        return {name: _parquet_files(some) for name, some in files.items()}
    return {name: _streamed(data) for name, data in builder.as_streaming_dataset().items()}


def _metadata(folder: Path) -> Path | None:
    """The file that describes an image folder."""
    files = (folder / f"metadata{suffix}" for suffix in (".jsonl", ".csv", ".parquet"))
    return next((file for file in files if file.is_file()), None)


def _directory(path: Path, config: str | None, split: str | None, default: str | None) -> Rows:
    import datasets

    if file := _metadata(path):
        return open_local(file, None, split, None)
    folders = {child.name: file for child in sorted(path.iterdir()) if (file := _metadata(child))}
    if folders:
        picked = _pick_split(list(folders), split, default, str(path))
        return _file(folders[picked], picked)
    named = None
    try:
        if (path / "dataset_dict.json").exists():
            saved = datasets.load_from_disk(str(path))
            splits = {name: _streamed(data.to_iterable_dataset()) for name, data in saved.items()}
        elif (path / "state.json").exists():
            splits = {"all": _streamed(datasets.load_from_disk(str(path)).to_iterable_dataset())}
        else:
            known = datasets.get_dataset_config_names(str(path))
            if config is not None and config not in known and (path / config).is_dir():
                path = path / config  # a copy without its card
            elif known != ["default"]:
                named = config
            splits = _splits(datasets.load_dataset_builder(str(path), named))
    except Exception as error:
        raise NotFoundError(
            f"{path}: cannot be read as a data set: {first_line(error)[:LONGEST_REASON]}"
        ) from error
    where = f"{path} ({named})" if named else str(path)
    picked = _pick_split(list(splits), split, default, where)
    record = {"path": str(path), "config": named, "split": picked}
    return Rows(_guarded(splits[picked], where), where, path, False, record)


def open_local(path: Path, config: str | None, split: str | None, default: str | None) -> Rows:
    """Rows of a local file or directory.

    Args:
        path: a file of one of ``SUFFIXES``, or a directory: an image folder with metadata, a copy of a Hub
            data set, or what ``save_to_disk`` of ``datasets`` wrote.
        config: configuration, if the directory has several; may be a subdirectory.
        split: split to read, which must be there.
        default: split to read when none is asked for and there are several.

    Raises:
        NotFoundError: not there, unreadable, or without that split.
    """
    if not path.exists():
        raise NotFoundError(f"{path}: no such file or directory")
    if path.is_dir():
        return _directory(path, config, split, default)
    if split is not None:
        raise NotFoundError(f"{path}: a single file has no split {split!r}")
    return _file(path)


def _commit(repository: str, revision: str | None) -> str:
    """The commit of a Hub data set, with one line for each way in which that fails."""
    from huggingface_hub import HfApi
    from huggingface_hub import errors as hub

    offline_hint = (
        "a local copy works offline: name its directory or file, or add path=DIR to a built-in task"
    )
    try:
        return str(HfApi().dataset_info(repository, revision=revision, timeout=10).sha)
    except hub.OfflineModeIsEnabled:
        raise NotFoundError(
            f"data set {repository!r}: the Hub is switched off (HF_HUB_OFFLINE)", offline_hint
        ) from None
    except hub.GatedRepoError:
        raise NotFoundError(
            f"data set {repository!r} is gated", "accept its terms on its page, then `hf auth login`"
        ) from None
    except hub.RevisionNotFoundError:
        raise NotFoundError(f"data set {repository!r} has no revision {revision!r}") from None
    except hub.RepositoryNotFoundError:
        raise
    except hub.HFValidationError as error:
        raise NotFoundError(f"data set {repository!r}: {first_line(error)[:LONGEST_REASON]}") from None
    except Exception as error:  # the HTTP client's own types differ between versions of huggingface_hub
        raise NotFoundError(
            f"data set {repository!r}: the Hub cannot be reached: {first_line(error)[:LONGEST_REASON]}",
            offline_hint,
        ) from error


def open_hub(
    repository: str, config: str | None, split: str | None, default: str | None, revision: str | None
) -> Rows:
    """Rows of a Hub data set, streamed.

    Args:
        repository: ``OWNER/NAME``; the owner ``*`` stands for each of ``ORGANISATIONS`` in turn.
        config: configuration, or None for the only one.
        split: split to read, which must be there.
        default: split to read when none is asked for and there are several.
        revision: branch, tag or commit; the record names the commit that was read.

    Raises:
        NotFoundError: not found, gated, offline, unreadable, or without that configuration or split.
    """
    import datasets
    from huggingface_hub.errors import RepositoryNotFoundError

    names = [repository.replace("*", owner) for owner in ORGANISATIONS] if "*" in repository else [repository]
    for name in names:
        try:
            commit = _commit(name, revision)
            break
        except RepositoryNotFoundError:
            continue
    else:
        raise NotFoundError(
            f"data set {' or '.join(map(repr, names))} is not on the Hub",
            "check the name; private ones need `hf auth login`",
        )
    where = f"{name} ({config})" if config else name
    try:
        splits = _splits(datasets.load_dataset_builder(name, config, revision=commit))
    except Exception as error:
        raise NotFoundError(
            f"data set {where}: cannot be read: {first_line(error)[:LONGEST_REASON]}"
        ) from error
    where = f"data set {where}"
    picked = _pick_split(list(splits), split, default, where)
    record = {"repository": name, "config": config, "split": picked, "revision": commit}
    return Rows(_guarded(splits[picked], where), where, None, True, record)


def joined(rows: Rows, images: Rows, key: str, identity: str) -> Rows:
    """Give each row the column ``image``: of the row of ``images`` whose ``identity`` equals the row's ``key``.

    The column holds a function that fetches the image, still encoded, so that only chosen rows cost a search.
    """
    found: dict[Any, Any] = {}

    def fetch(wanted: Any) -> Any:
        while wanted not in found:
            row = next(images.rows, None)
            if row is None:
                raise BadRow(f"column {key!r}: {images.where} has no image {wanted!r}")
            if isinstance(row, BadRow):
                raise row
            found[row[identity]] = row["image"]
        return found[wanted]

    def with_image(row: Row | BadRow) -> Row | BadRow:
        return Row(row, image=partial(fetch, row[key])) if isinstance(row, Row) and key in row else row

    return Rows(map(with_image, rows.rows), rows.where, images.folder, rows.remote, rows.record)
