"""Decoding images, whatever form a data set keeps them in."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtwcli.data.cells import BadRow, shown
from vtwcli.data.rows import LONGEST_REASON
from vtwcli.data.spec import is_path
from vtwcli.errors import first_line
from vtwcli.io import console
from vtwcli.io.files import regular

if TYPE_CHECKING:
    from PIL.Image import Image

CLIP_MEAN = (122, 116, 104)  # of 255, rounded down: 0.48145466, 0.4578275 and 0.40821073
MAX_BYTES = 256 << 20  # of one picture's file inside an archive or on the Hub
_ARCHIVES = ("zip", "tar", "gzip", "bz2", "xz", "zstd", "lz4")  # what an address may look into
_DATA = re.compile(r"data:[\w.+/-]*(?:;[\w.+-]+=[^;,]*)*(;base64)?,", re.IGNORECASE)
_SHORTEST_BASE64 = 48  # characters; no picture has fewer, most names of files do
_LONGEST_PATH = 4096  # characters


def decode_image(value: Any, column: str, folder: Path | None, within: str | None = None) -> Image:
    """An image column's value as an upright RGB image; see ``pixels`` for how pictures are shown.

    Args:
        value: a PIL image, encoded bytes, a path, the bytes as base64 text (alone or as a ``data:`` address), a
            ``{"bytes", "path"}`` record of ``datasets``, or a function that returns one of these.
        column: its name, for messages.
        folder: where a relative path begins.
        within: how addresses of this very data set on the Hub begin, for rows that come from there; such rows name
            no files of this machine.

    Raises:
        BadRow: empty, missing, not an image, or one that cannot be shown faithfully.
    """
    from PIL import Image

    from vtwcli.data.pixels import read_picture

    if callable(value):
        value = value()
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if value is None or value == "":
        raise BadRow(f"column {column!r} is empty")
    name = shown(value) if isinstance(value, str) else "the image"
    with _complaints(column, name):
        source: bytes | Path | Image.Image
        if isinstance(value, str):
            source = _encoded(value, folder) or _located(value, folder, within)
        elif isinstance(value, bytes | bytearray | Image.Image):
            source = bytes(value) if isinstance(value, bytearray) else value
        else:
            raise BadRow(f"column {column!r} holds a {type(value).__name__}, not an image or a path")
        image, left_out = read_picture(source)
    for what in left_out:
        warn_once(what)
    return image


def squared(image: Image) -> Image:
    """A picture in the middle of a square of its longer side, with bars beside it, as LLaVA-1.5 was trained and run.

    The bars have the mean colour of CLIP's images, so that behind its normalisation they are zero.
    """
    from PIL import Image as Pillow

    edge = max(image.size)
    if image.size == (edge, edge):
        return image
    square = Pillow.new("RGB", (edge, edge), CLIP_MEAN)
    square.paste(image, ((edge - image.width) // 2, (edge - image.height) // 2))
    return square


@cache
def warn_once(what: str) -> None:
    console.warn(f"some pictures: {what}")


@contextmanager
def _complaints(column: str, name: str) -> Iterator[None]:
    """Turn whatever reading a picture raises into one line about its row."""
    try:
        yield
    except BadRow:
        raise
    except FileNotFoundError:
        raise BadRow(f"column {column!r}: no file {name}") from None
    except Exception as error:  # archives and networks raise too many types to list
        raise BadRow(
            f"column {column!r}: cannot decode {name}: {first_line(error)[:LONGEST_REASON]}"
        ) from error


def _encoded(text: str, folder: Path | None) -> bytes | None:
    """The bytes that base64 text stands for; None where the text is a path or an address."""
    if text[:5].lower() == "data:":
        head = _DATA.match(text[:1000])
        if head is None or not head[1]:
            raise ValueError("of data: addresses those are read that begin with data:image/KIND;base64,")
        text = text[head.end() :]
    elif len(text) < _SHORTEST_BASE64 or not re.fullmatch(r"[A-Za-z0-9+/_\s-]+=*\s*", text):
        return None
    if len(text) < _LONGEST_PATH and _path(text, folder) is not None:
        return None
    plain = re.sub(r"\s+", "", text).rstrip("=").translate(str.maketrans("-_", "+/"))
    try:
        return base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
    except binascii.Error as error:
        raise ValueError(f"it is not valid base64: {error}") from None


def _located(address: str, folder: Path | None, within: str | None) -> Path | bytes:
    """The path that text names, or the bytes inside an archive; nothing but files is opened, and nothing fetched.

    Addresses are those that ``datasets`` gives, ``zip://INNER::OUTER``; the outermost is a file, or for rows from the
    Hub a file of the same data set.
    """
    *inner, outer = address.split("::") if "://" in address else [address]
    kinds = [part.split("://")[0] for part in inner]
    at_home = within is not None and outer.startswith(within)
    if any(kind not in _ARCHIVES for kind in kinds) or ("://" in outer and not at_home):
        web = re.search(r"(?:^|::)(?:https?|ftp)://", address)
        raise ValueError(f"{'web' if web else 'such'} addresses are not fetched")
    if within is not None and not at_home:
        raise ValueError("a data set on the Hub names its own files only")
    if inner or at_home:
        import fsspec

        if not at_home:
            outer = str(_file(outer, folder))
        with fsspec.open("::".join([*inner, outer]), "rb") as stream:
            data = bytes(stream.read(MAX_BYTES + 1))
        if len(data) > MAX_BYTES:
            raise ValueError(f"it is larger than {MAX_BYTES >> 20} MiB")
        return data
    return _file(address, folder)


def _file(text: str, folder: Path | None) -> Path:
    path = _path(text, folder)
    if path is None:
        raise FileNotFoundError
    return regular(path)


def _path(text: str, folder: Path | None) -> Path | None:
    path = (folder or Path()) / Path(text).expanduser()
    return path if is_path(str(path)) else None
