"""What an export is made from: where the model lies, and which of its files may be copied."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vtwcli.errors import NotFoundError
from vtwcli.io import console
from vtwcli.io.outputs import Inputs, inputs_of
from vtwcli.models.checkpoint import Checkpoint

_READ = ("merges.txt", "vocab.txt")  # text that tokenizers are made of


def own_files(checkpoint: Checkpoint, patterns: Sequence[str], warn: bool = True) -> list[Path]:
    """The files of a model directory that may go into a copy: regular ones that lie inside it.

    Where config.json is a link, so may the others be, into the same directory: the Hub's cache keeps all files of a
    repository in one. A link to elsewhere is left out with a warning where nothing depends on it (licences, notes),
    and refused where it is part of the model.

    Raises:
        NotFoundError: a part of the model lies elsewhere.
    """
    within = [checkpoint.path.resolve(), (checkpoint.path / "config.json").resolve().parent]
    found = {file: None for pattern in patterns for file in sorted(checkpoint.path.glob(pattern))}
    kept = []
    for file in found:
        if not file.is_file():
            continue
        place = file.resolve()
        if any(place.is_relative_to(inside) for inside in within):
            kept.append(file)
        elif file.suffix in (".json", ".jinja", ".model") or file.name in _READ:
            raise NotFoundError(
                f"{file} is a link to {place}, outside of the model's directory, and is not copied",
                "put the file itself there, if it belongs to the model",
            )
        elif warn:
            console.warn(f"{file} is a link to {place}, outside of the model's directory: left out")
    return kept


def source_of(model: Any) -> Inputs:
    """The directory of a model that is exported, which is never where the export goes.

    Args:
        model: a name, or a checkpoint or loaded model.
    """
    place = model if isinstance(model, str) else getattr(getattr(model, "checkpoint", model), "path", None)
    return inputs_of({"the model": place})
