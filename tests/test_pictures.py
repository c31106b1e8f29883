"""Pictures look to the model as to a person: every mode and kind of file, one implementation for loader and script."""

import base64
import datetime
import io
import os
import random
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from vtwcli.data import images
from vtwcli.data.cells import BadRow
from vtwcli.data.images import decode_image
from vtwcli.data.pixels import ANIMATED, TRANSPARENT, PictureError, check_resized, read_picture

COLOURS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
PICTURE = Image.fromarray(COLOURS)
GREY = np.array(PICTURE.convert("L"))


def saved(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def seen(source) -> np.ndarray:
    """What the model sees of a file's bytes; a path and an open picture must look the same."""
    image, _ = read_picture(source)
    assert image.mode == "RGB"
    return np.asarray(image)


def thrice(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[:, :, None], 3, 2)


def tiff(values: np.ndarray, *, bits: int = 16, photometric: int = 1, sample_format: int = 1) -> bytes:
    """A little-endian TIFF of one strip, for what Pillow does not write; 12 bits are packed from the highest."""
    high, wide = values.shape
    if bits == 12:
        rows = ["".join(f"{int(x):012b}" for x in row) for row in values]
        data = b"".join(
            int(row.ljust(-(-len(row) // 8) * 8, "0"), 2).to_bytes(-(-len(row) // 8)) for row in rows
        )
    else:
        data = values.tobytes()
    tags = {256: wide, 257: high, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: high}
    tags |= {279: len(data), 339: sample_format}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, tags[tag]) for tag in sorted(tags))
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory


# --- modes -------------------------------------------------------------------------------------------------------


def made(mode: str) -> tuple[Image.Image, np.ndarray]:
    """A picture of a mode, and the RGB that a person sees in it (for transparent ones the colours beneath)."""
    alpha = Image.fromarray(np.full(GREY.shape, 128, dtype=np.uint8))
    few = PICTURE.quantize(16)
    if mode == "1":
        image = PICTURE.convert("1")
        return image, thrice(np.where(np.asarray(image), 255, 0).astype(np.uint8))
    if mode == "L":
        return Image.fromarray(GREY), thrice(GREY)
    if mode in ("LA", "La"):
        whole = Image.merge("LA", (Image.fromarray(GREY), alpha))
        return whole if mode == "LA" else whole.convert("RGBA").convert("RGBa"), thrice(GREY)
    if mode == "P":
        return few, np.asarray(few.convert("RGB"))
    if mode == "PA":
        image = few.convert("PA")
        image.putalpha(alpha)
        return image, np.asarray(few.convert("RGB"))
    if mode in ("RGBA", "RGBa"):
        image = PICTURE.copy()
        image.putalpha(alpha)
        return image if mode == "RGBA" else image.convert("RGBa"), COLOURS
    if mode.startswith("I;16"):
        wide = GREY.astype(">u2" if mode == "I;16B" else "<u2") * 257
        return Image.frombytes(mode, PICTURE.size, wide.tobytes()), thrice(GREY)
    if mode == "LAB":
        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        return ImageCms.profileToProfile(PICTURE, *profiles, outputMode="LAB"), COLOURS
    return PICTURE.convert(mode), COLOURS


MODES = ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"]
MODES += ["I;16", "I;16L", "I;16B", "I;16N"]


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_shown_as_it_looks(mode):
    image, expected = made(mode)
    tolerance = {"YCbCr": 3, "HSV": 8, "LAB": 20, "La": 2, "RGBa": 2}.get(mode, 0)
    shown = seen(image)
    assert np.abs(shown.astype(int) - expected).max() <= tolerance
    assert np.array_equal(np.asarray(decode_image(image, "image", None)), shown)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_numbers_without_a_known_white_are_refused(mode):
    with pytest.raises(
        PictureError, match=r"it holds (whole numbers|floats) \(mode [IF]\), and nothing says"
    ):
        read_picture(Image.fromarray(GREY.astype(np.int32 if mode == "I" else np.float32)))
    file = tiff(GREY.astype(np.float32), bits=32, sample_format=3)
    with pytest.raises(PictureError, match="it holds floats"):
        read_picture(file)


def test_the_list_of_modes_is_pillow_s():
    """A mode that a later Pillow brings is looked at before it is shown."""
    known = {*MODES, "I", "F", "BGR;15", "BGR;16", "BGR;24"}
    assert set(Image._MODE_CONV if hasattr(Image, "_MODE_CONV") else Image.MODES) <= known


# --- kinds of files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_grey_of_16_bits_is_scaled_and_not_cut_off(kind):
    values = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    if kind == "PPM":
        file = b"P5 16 16 65535\n" + values.astype(">u2").tobytes()
    else:
        file = saved(Image.fromarray(values), kind)
    assert np.array_equal(seen(file), thrice(np.arange(256, dtype=np.uint8).reshape(16, 16)))


def test_tiffs_of_other_depths_and_with_black_as_the_highest():
    values = np.linspace(0, 4095, 24).round().astype(np.uint16).reshape(4, 6)
    eight = np.round(values / 4095 * 255)
    assert np.abs(seen(tiff(values, bits=12)) - thrice(eight)).max() <= 1
    wide = (GREY.astype("<u2")) * 257
    assert np.array_equal(seen(tiff(wide)), thrice(GREY))
    assert np.array_equal(seen(tiff(wide, photometric=0)), thrice(255 - GREY))


def test_colours_of_16_bits_keep_their_high_byte():
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in (COLOURS.astype(np.uint16) * 257))

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 7, 5, 16, 2, 0, 0, 0)
    file = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )
    assert np.array_equal(seen(file), COLOURS)


def test_a_photograph_for_printing():
    file = saved(PICTURE.resize((70, 50), 0).convert("CMYK"), "JPEG", quality=100, subsampling=0)
    assert b"Adobe" in file  # which stores ink upside down
    big = np.asarray(PICTURE.resize((70, 50), 0)).astype(int)
    assert np.abs(seen(file) - big).mean() < 6


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_cameras_may_be_turned(kind, orientation):
    upright = np.zeros((32, 48, 3), dtype=np.uint8)
    upright[:16, :16] = 255  # the upper left corner tells all eight apart
    upright[16:, 16:, 0] = 255
    turned = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    stored = Image.fromarray(np.ascontiguousarray(turned))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95, "subsampling": 0}}.get(kind, {})
    shown = seen(saved(stored, kind, exif=exif, **options)).astype(int)
    assert shown.shape == upright.shape
    assert np.abs(shown - upright).max() <= (20 if kind == "JPEG" else 0)


def test_a_broken_exif_block_does_not_hide_a_picture():
    exif = Image.Exif()
    exif[0x0112] = 6
    file = saved(PICTURE, "JPEG", exif=exif, quality=100, subsampling=0)
    broken = file.replace(b"MM\x00*", b"XX\x00*")
    assert broken != file
    assert seen(broken).shape == (5, 7, 3)


# --- what is left out --------------------------------------------------------------------------------------------


def test_transparency_shows_the_colours_beneath_as_transformers_does():
    from transformers.image_utils import load_image

    clear, _ = made("RGBA")
    palette = PICTURE.quantize(16)
    palette.info["transparency"] = 3
    keyed = saved(PICTURE, "PNG", transparency=tuple(int(x) for x in COLOURS[0, 0]))
    for file in (saved(clear), saved(palette, transparency=3), keyed, saved(made("LA")[0])):
        image, left_out = read_picture(file)
        assert left_out == (TRANSPARENT,)
        assert np.array_equal(np.asarray(image), np.asarray(load_image(Image.open(io.BytesIO(file)))))
    opaque = PICTURE.copy()
    opaque.putalpha(255)
    assert read_picture(saved(opaque))[1] == ()


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_an_animation_the_first_picture_is_shown(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "lime")]
    more = {"lossless": True} if kind == "WEBP" else {}
    file = saved(frames[0], kind, save_all=True, append_images=frames[1:], **more)
    image, left_out = read_picture(file)
    assert left_out == (ANIMATED,)
    assert np.array_equal(np.asarray(image), np.asarray(frames[0]))


def test_the_user_is_told_once(capfd):
    images.warn_once.cache_clear()
    clear, _ = made("RGBA")
    for _ in range(3):
        decode_image(saved(clear), "image", None)
    assert capfd.readouterr().err.count("transparency is left out") == 1


# --- refusals ----------------------------------------------------------------------------------------------------


def header_only(width: int, height: int) -> bytes:
    data = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + data
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return start + struct.pack(">I", 1000) + b"IDAT"


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        (saved(PICTURE.resize((90, 90)))[:-700], "truncated"),
        (saved(PICTURE.resize((90, 90)), "JPEG")[:-300], "truncated"),
        (header_only(100_000, 100_000), "it is too large|decompression bomb"),
        (header_only(10_000, 9_999), "it is too large: 10000 x 9999 pixels"),
        (saved(Image.new("L", (50_000, 1))), "it is too thin: 50000 x 1 pixels, at most 200 to 1"),
        (saved(Image.new("L", (1, 201))), "it is too thin"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "cannot identify"),
        (b"no picture", "cannot identify image file"),
        (b"", "cannot identify image file"),
    ],
)
def test_what_cannot_be_shown_is_refused(file, reason):
    with pytest.raises(PictureError, match=reason):
        read_picture(file)
    with pytest.raises(BadRow, match=rf"^column 'photo': cannot decode the image: .*({reason})"):
        decode_image(file, "photo", None)


def test_pictures_grow_within_bounds():
    check_resized(200, 1, 224)
    check_resized(1000, 1000, 4096)
    with pytest.raises(
        PictureError, match=r"a picture of 1 x 200 pixels is too thin: with 336 pixels .* 22 million"
    ):
        check_resized(1, 200, 336)


def test_a_path_must_be_a_file(tmp_path):
    with pytest.raises(PictureError, match="there is no such file"):
        read_picture(tmp_path / "none.png")
    os.mkfifo(tmp_path / "pipe.png")
    for name in (".", "pipe.png"):
        with pytest.raises(PictureError, match="it is not a regular file"):
            read_picture(tmp_path / name)
    (tmp_path / "a.png").write_bytes(saved(PICTURE))
    assert np.array_equal(np.asarray(read_picture(tmp_path / "a.png")[0]), COLOURS)


# --- base64 and addresses ----------------------------------------------------------------------------------------


def test_base64_is_a_picture(tmp_path):
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (300, 300, 3), dtype=np.uint8))
    text = base64.b64encode(saved(noise)).decode()
    assert len(text) > 300_000
    spaced = "\n".join(text[at : at + 76] for at in range(0, len(text), 76))
    forms = (
        text,
        spaced,
        text.rstrip("="),
        base64.urlsafe_b64encode(saved(noise)).decode(),
        f"data:image/png;base64,{text}",
        f"DATA:image/png;charset=utf-8;base64,{text}",
        {"bytes": text, "path": None},
    )
    for form in forms:
        assert np.array_equal(np.asarray(decode_image(form, "image", tmp_path)), np.asarray(noise))
    small = base64.b64encode(saved(Image.new("L", (1, 1), 9))).decode()
    assert np.asarray(decode_image(small, "image", tmp_path)).tolist() == [[[9, 9, 9]]]


def test_a_file_with_a_name_like_base64_is_a_file(tmp_path):
    name = "0123456789abcdef" * 4
    (tmp_path / name).write_bytes(saved(PICTURE))
    assert np.array_equal(np.asarray(decode_image(name, "image", tmp_path)), COLOURS)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("QUJD" * 100_000, "cannot identify image file"),
        ("QUJD" * 100_000 + "Q", "it is not valid base64"),
        ("x" * 1_000_000 + ".png", "no file"),
        ("data:image/png;base64,####", "it is not valid base64"),
        ("data:image/svg+xml,<svg/>", "of data: addresses those are read that begin with"),
    ],
)
def test_a_message_never_repeats_a_picture(text, reason, tmp_path):
    with pytest.raises(BadRow, match=reason) as caught:
        decode_image(text, "image", tmp_path)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "address",
    [
        "https://example.org/x.png",
        "HTTP://example.org/x.png",
        "ftp://example.org/x.png",
        "s3://bucket/x.png",
        "memory://x.png",
        "hf://datasets/owner/name/x.png",
        "file:///etc/hostname",
        "simplecache::https://example.org/x.png",
        "filecache://x.png::memory://x",
        "zip://x.png::https://example.org/x.zip",
        "zip://x.png::zip://y.zip::s3://bucket/x.zip",
        "github://owner:repo@main/x.png",
        "reference://x::x.json",
        "smb://host/x.png",
    ],
)
def test_addresses_are_not_fetched(address, tmp_path):
    with pytest.raises(BadRow, match="addresses are not fetched"):
        decode_image(address, "image", tmp_path)


def test_data_on_the_hub_name_their_own_files_only(tmp_path):
    home = "hf://datasets/owner/name@0123/"
    (tmp_path / "x.png").write_bytes(saved(PICTURE))
    for address in ("hf://datasets/other/name@0123/x.png", "zip://x.png::hf://datasets/owner/name2@0/x.zip"):
        with pytest.raises(BadRow, match="such addresses are not fetched"):
            decode_image(address, "image", None, home)
    for address in (str(tmp_path / "x.png"), f"zip://x.png::{tmp_path / 'x.zip'}"):
        with pytest.raises(BadRow, match="a data set on the Hub names its own files only"):
            decode_image(address, "image", None, home)


# --- mutations ---------------------------------------------------------------------------------------------------


def test_mutated_files_are_pictures_or_refused(tmp_path):
    """A fresh seed a day; ``VTW_TEST_SEED`` repeats one."""
    seed = int(os.environ.get("VTW_TEST_SEED", datetime.datetime.now(datetime.UTC).strftime("%Y%m%d")))
    generator = random.Random(seed)
    photo = Image.fromarray(np.random.default_rng(2).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "camera"
    originals = {
        "jpeg": saved(photo, "JPEG", exif=exif),
        "png": saved(photo, "PNG", exif=exif),
        "png 16": saved(Image.fromarray(np.asarray(photo)[:, :, 0].astype(np.uint16) * 257)),
        "palette": saved(photo.quantize(64), "PNG", transparency=5),
        "gif": saved(photo, "GIF", save_all=True, append_images=[photo.rotate(180)]),
        "webp": saved(photo, "WEBP", exif=exif),
        "tiff": saved(photo, "TIFF", exif=exif, compression="tiff_lzw"),
        "cmyk": saved(photo.convert("CMYK"), "TIFF"),
        "bmp": saved(photo, "BMP"),
    }
    shown = refused = 0
    for name, original in originals.items():
        for number in range(60):
            data = bytearray(original)
            for _ in range(generator.choice((1, 1, 3, 20))):
                # the beginning is where the structure is
                at = generator.randrange(generator.choice((64, len(data))))
                data[at % len(data)] = generator.choice((0, 0xFF, 0x7F, generator.randrange(256)))
            if generator.random() < 0.2:
                del data[generator.randrange(len(data)) :]
            case = f"VTW_TEST_SEED={seed}: {name} {number}"
            begun = time.monotonic()
            try:
                image = decode_image(bytes(data), "image", tmp_path)
                assert image.mode == "RGB" and image.width > 0, case
                shown += 1
            except BadRow as error:
                assert len(str(error)) < 500, case
                refused += 1
            except Exception as error:
                pytest.fail(f"{case}: {type(error).__name__}: {error}")
            assert time.monotonic() - begun < 20, case
    assert shown and refused, f"VTW_TEST_SEED={seed}"
