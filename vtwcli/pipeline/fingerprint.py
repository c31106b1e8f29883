"""What a step's inputs are, as short digests: equal digests stand for equal inputs, and a kept result still holds."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtwcli.data.spec import DataSpec
from vtwcli.recipe.recipe import ModelSection

if TYPE_CHECKING:
    from vtwcli.models.checkpoint import Checkpoint

_WHOLE = 256 << 20  # files up to this many bytes are hashed from end to end
_PIECE = 4096  # of larger files the beginning, the middle and the end of every tensor


def digest(value: Any) -> str:
    """Of plain JSON values, 16 hexadecimal digits."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def file_digest(file: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def model_record(model: ModelSection) -> dict[str, Any]:
    """Which model it is: ``name``, ``revision`` (the Hub commit, or None) and ``fingerprint`` of its files.

    A commit says everything. The files of a directory are hashed, weight files beyond 256 MiB by their headers and
    three pieces of every tensor: training changes all of a tensor, and the whole of a large model takes minutes to
    read.

    Raises:
        NotFoundError: there is no such model, or its files cannot be read.
    """
    from vtwcli.models.hub import resolve

    found = resolve(model.name, trust_remote_code=model.trust_remote_code, weights=False)
    fingerprint = digest(found.revision) if found.revision else _files(found)
    return {"name": model.name, "revision": found.revision, "fingerprint": fingerprint}


def data_records(
    data: Sequence[DataSpec], *, limit: int, seed: int, skip_bad: bool = False
) -> list[dict[str, Any]]:
    """What each source gives: of local data a digest over the chosen samples, of a Hub data set its commit.

    Raises:
        NotFoundError: a source is missing, unreadable, or not to be reached.
    """
    from vtwcli.data.sources import identify

    return [identify(spec, limit=limit, seed=seed, skip_bad=skip_bad) for spec in data]


def _files(checkpoint: Checkpoint) -> str:
    """Of all files at the top of a model directory; a changed name, size or content changes it."""
    sha256 = hashlib.sha256()
    large = set()
    for file in sorted(checkpoint.path.iterdir()):
        if not file.is_file() or file.name.startswith("."):
            continue
        size = file.stat().st_size
        sha256.update(os.fsencode(file.name) + f":{size}:".encode())
        if size <= _WHOLE:
            sha256.update(file_digest(file).encode())
        else:
            large.add(file)
    if large:
        for name, tensor in sorted(checkpoint.tensors.items()):
            if tensor.file not in large:
                continue
            sha256.update(
                f"{name}:{tensor.dtype}:{tensor.shape}:{tensor.start}:".encode("utf-8", "surrogatepass")
            )
            with tensor.file.open("rb") as stream:
                for offset in (0, tensor.nbytes // 2, max(0, tensor.nbytes - _PIECE)):
                    stream.seek(tensor.start + offset)
                    sha256.update(stream.read(min(_PIECE, tensor.nbytes - offset)))
    return sha256.hexdigest()[:16]
