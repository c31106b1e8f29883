"""A picture's file as the model is to see it: upright RGB of 8 bits.

This file needs numpy and Pillow only: an exported directory of ONNX graphs carries a copy of it, so that its script
shows the model the same pixels. The rules are those of transformers' own loader where that shows what a person sees:

- A camera's turn (EXIF orientation) is undone.
- Transparency is dropped: the colours beneath it are shown, whatever they are, and nothing is put behind them.
- Of an animation, or of a file of several pages, the first picture is shown.
- Colour profiles (ICC) are not applied.
- Grey of 16 bits is scaled to 8 (transformers' loader cuts it off, which makes nearly everything white).

What cannot be shown faithfully is refused: whole numbers of 32 bits and floats, whose black and white no file tells,
pictures that are cut off, too large or too thin, and files that are programs (EPS).
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

MAX_PIXELS = 89_478_485  # what Pillow warns at; a file of a few hundred bytes may claim any size
MAX_RATIO = 200  # long side to short side; Qwen's processors refuse more too
MAX_RESIZED = 1 << 24  # pixels, where a processor scales the short side to a fixed length
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # by EXIF orientation
_ORIENTATION, _BITS, _PHOTOMETRIC = 0x0112, 258, 262
_PLAIN = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV")
_NOT_PICTURES = ("EPS", "WMF")  # Pillow runs another program to draw them
_ONE_PICTURE = ("MPO", "PSD", "ICO", "CUR", "ICNS")  # further frames are other views of the same
TRANSPARENT = "transparency is left out: the model sees the colours beneath it"
ANIMATED = "of several frames or pages the model sees the first"


class PictureError(ValueError):
    """A picture that cannot be shown to the model; one line says why."""


def read_picture(source: bytes | Path | Image.Image) -> tuple[Image.Image, tuple[str, ...]]:
    """A picture as upright RGB of 8 bits, and what of it is not shown (``TRANSPARENT``, ``ANIMATED``).

    Args:
        source: a file's bytes, its path, or a picture that is open already.

    Raises:
        PictureError: not a picture, broken, too large or too thin, or of a kind that cannot be shown faithfully.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on sizes, looked at below, and on details of broken metadata
            return _read(source)
    except PictureError:
        raise
    except UnidentifiedImageError:
        raise PictureError("cannot identify image file") from None
    except Exception as error:  # decoders raise whatever a broken file leads them to
        lines = str(error).strip().splitlines()
        raise PictureError(lines[0][:300] if lines else type(error).__name__) from error


def check_resized(width: int, height: int, edge: int) -> None:
    """Refuse a picture that is so thin that scaling its short side to ``edge`` pixels would take gigabytes.

    Raises:
        PictureError: more than ``MAX_RESIZED`` pixels would come out.
    """
    pixels = edge * edge * max(width, height) // min(width, height)
    if pixels > MAX_RESIZED:
        raise PictureError(
            f"a picture of {width} x {height} pixels is too thin: with {edge} pixels on its short side "
            f"it would have {pixels // 10**6} million"
        )


def _read(source: bytes | Path | Image.Image) -> tuple[Image.Image, tuple[str, ...]]:
    image = source if isinstance(source, Image.Image) else _open(source)
    width, height = image.size
    if width < 1 or height < 1:
        raise PictureError("it has no pixels")
    if width * height > MAX_PIXELS:
        raise PictureError(f"it is too large: {width} x {height} pixels, at most {MAX_PIXELS} are read")
    if max(width, height) > MAX_RATIO * min(width, height):
        raise PictureError(f"it is too thin: {width} x {height} pixels, at most {MAX_RATIO} to 1 are shown")
    several = image.format not in _ONE_PICTURE and getattr(image, "is_animated", False)
    image.load()
    shown = _rgb(image)
    turn = _TURNS.get(_orientation(image))
    if turn is not None:
        shown = shown.transpose(turn)
    left_out = [TRANSPARENT] * _shines_through(image) + [ANIMATED] * bool(several)
    return shown, tuple(left_out)


def _open(source: bytes | Path) -> Image.Image:
    if isinstance(source, Path) and not source.is_file():
        raise PictureError("it is not a regular file" if source.exists() else "there is no such file")
    Image.init()
    formats = [name for name in Image.ID if name not in _NOT_PICTURES]
    return Image.open(source if isinstance(source, Path) else io.BytesIO(source), formats=formats)


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation of a loaded picture; 1, upright, where it has none or one that cannot be read."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # viewers show such a picture as it is stored
        return 1


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return _grey(image).convert("RGB")
    if image.mode == "LAB":
        from PIL import ImageCms

        lab, rgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, lab, rgb, outputMode="RGB")
        assert converted is not None  # it is where nothing is changed in place
        return converted
    if image.mode in ("La", "RGBa"):  # colours that were multiplied by their opacity
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    if image.mode not in _PLAIN:
        raise PictureError(f"pictures of the mode {image.mode} cannot be shown faithfully")
    return image.convert("RGB")


def _grey(image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits scaled to 8, where the file tells what white is."""
    most, inverted = 0xFFFF, False
    known = (None, "PNG", "PPM", "TIFF", "JPEG2000") if image.mode.startswith("I;16") else ("PNG", "PPM")
    if image.mode == "F" or image.format not in known:
        kind = "floats" if image.mode == "F" else "whole numbers"
        raise PictureError(f"it holds {kind} (mode {image.mode}), and nothing says which of them is white")
    if image.format == "TIFF":
        tags = image.tag_v2  # type: ignore[attr-defined]
        most, inverted = 2 ** int(tags[_BITS][0]) - 1, tags.get(_PHOTOMETRIC) == 0
    values = np.clip(np.asarray(image).astype(np.int64), 0, most)
    eight = ((2 * 255 * values + most) // (2 * most)).astype(np.uint8)  # rounded
    return Image.fromarray(255 - eight if inverted else eight)


def _shines_through(image: Image.Image) -> bool:
    """Whether any pixel is not opaque."""
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        alpha = image.getchannel(image.getbands()[-1])
    elif image.mode.startswith("I"):
        return "transparency" in image.info
    elif "transparency" in image.info or (image.palette is not None and image.palette.mode == "RGBA"):
        alpha = image.convert("RGBA").getchannel("A")
    else:
        return False
    lowest = alpha.getextrema()[0]
    return bool(lowest < 255)  # type: ignore[operator]
