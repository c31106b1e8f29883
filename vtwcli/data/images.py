"""Decoding images, whatever form a data set keeps them in."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtwcli.data.rows import first_line
from vtwcli.data.tasks import BadRow
from vtwcli.files import regular

if TYPE_CHECKING:
    from PIL.Image import Image


def decode_image(value: Any, column: str, folder: Path | None) -> Image:
    """An image column's value as an upright RGB image.

    Args:
        value: a PIL image, encoded bytes, a path, a ``{"bytes", "path"}`` record of ``datasets``, or a
            function that returns one of these.
        column: its name, for messages.
        folder: where a relative path begins.

    Raises:
        BadRow: empty, missing or not an image.
    """
    from PIL import Image, ImageOps

    if callable(value):
        value = value()
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if value is None or value == "":
        raise BadRow(f"column {column!r} is empty")
    name = "the image"
    try:
        if isinstance(value, Image.Image):
            image = value
        elif isinstance(value, bytes | bytearray):
            image = Image.open(io.BytesIO(value))
        elif isinstance(value, str):
            name = repr(value)
            image = Image.open(
                _remote(value) if "://" in value else regular((folder or Path()) / Path(value).expanduser())
            )
        else:
            raise BadRow(f"column {column!r} holds a {type(value).__name__}, not an image or a path")
        with image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError:
        raise BadRow(f"column {column!r}: no file {name}") from None
    except BadRow:
        raise
    except Exception as error:  # decoders raise whatever a broken file leads them to
        raise BadRow(f"column {column!r}: cannot decode {name}: {first_line(error)}") from error


def _remote(address: str) -> io.BytesIO:
    """A file inside a Hub data set or an archive, by the address that ``datasets`` gives; nothing else is fetched."""
    if re.search(r"(?:^|::)(?:https?|ftp)://", address):
        raise ValueError("web addresses are not fetched")
    import fsspec

    with fsspec.open(address, "rb") as stream:
        return io.BytesIO(stream.read())
