"""Where rows come from: a local file, a local directory, or a data set on the Hub, read as a stream.

Directories and Hub data sets are read through ``datasets``. Images stay encoded, so that only chosen rows are decoded.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from vtwcli.data.cells import BadRow, Row, listed
from vtwcli.data.rows import LONGEST_REASON, SUFFIXES, Rows, guarded, label_name, open_file, parquet_rows
from vtwcli.data.tasks import ORGANISATIONS
from vtwcli.errors import NotFoundError, first_line
from vtwcli.io.documents import nearest

_SPLITS = ("test", "validation", "train")  # which split is read when nothing says so
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


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
        yield Row(values, **{name: label_name(names, values[name]) for name, names in labels.items()})


def _parquet_files(files: Sequence[str]) -> Iterator[Row | BadRow]:
    from huggingface_hub import HfFileSystem

    for file in files:
        if file.startswith("hf://"):
            with HfFileSystem().open(file, "rb", block_size=2**20) as stream:
                yield from parquet_rows(stream)
        else:
            yield from parquet_rows(Path(file))


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


def _beside_pictures(folder: Path) -> Path | None:
    """The one file of rows in a folder that holds pictures too, whatever it is called.

    Raises:
        NotFoundError: there are several.
    """
    inside = [child for child in sorted(folder.iterdir()) if not child.name.startswith(".")]
    below = [one for child in inside if child.is_dir() for one in islice(child.iterdir(), 100)]
    if not any(one.suffix.lower() in _PICTURES for one in (*inside, *below)):
        return None
    tables = [child for child in inside if child.suffix.lower() in SUFFIXES and child.is_file()]
    if (folder / "README.md").exists() or any(re.match("train|test|val|dev", file.stem) for file in tables):
        return None  # a data set with splits of its own
    if len(tables) > 1:
        raise NotFoundError(
            f"{folder}: pictures, and several files of rows: {listed(file.name for file in tables)}",
            f"name one: --data {shlex.quote(str(tables[0]))}",
        )
    return tables[0] if tables else None


def _directory(path: Path, config: str | None, split: str | None, default: str | None) -> Rows:
    import datasets

    if file := _metadata(path):
        return open_local(file, None, split, None)
    if file := _beside_pictures(path):
        return open_local(file, None, split, None)
    folders = {child.name: file for child in sorted(path.iterdir()) if (file := _metadata(child))}
    if folders:
        picked = _pick_split(list(folders), split, default, str(path))
        return open_file(folders[picked], picked)
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
    return Rows(guarded(splits[picked], where), where, path, False, record)


def open_local(path: Path, config: str | None, split: str | None, default: str | None) -> Rows:
    """Rows of a local file or directory.

    Args:
        path: a file of one of ``SUFFIXES``, or a directory: pictures with a file of rows, a copy of a Hub
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
    return open_file(path)


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
    return Rows(guarded(splits[picked], where), where, None, True, record)


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
