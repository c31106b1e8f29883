"""The stand-alone script prepares pictures and prompts as transformers' own processors do."""

from __future__ import annotations

import importlib
import sys

import numpy as np
import pytest
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

from vtwcli import ort
from vtwcli.data import pixels

PINPOINTS = [[32, 64], [64, 32], [64, 64], [96, 32]]
SIZES = [(40, 40), (90, 33), (33, 90), (200, 120), (31, 64), (17, 70)]  # width, height


@pytest.fixture(scope="module")
def script():
    """The script as a module; beside an exported model it imports copies of ``vtwcli.ort`` and ``data.pixels``."""
    sys.modules |= {"vtw_ort": ort, "vtw_pixels": pixels}
    try:
        yield importlib.import_module("vtwcli.export.onnx.run_onnx")
    finally:
        del sys.modules["vtw_ort"], sys.modules["vtw_pixels"]


def picture(size):
    width, height = size
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


CROP = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
PROCESSORS = {
    "clip": ("rows", CLIPImageProcessorPil(**CROP)),
    "llava padded": ("rows", LlavaImageProcessorPil(do_pad=True, **CROP)),
    "siglip-like": ("rows", CLIPImageProcessorPil(size={"height": 24, "width": 32}, do_center_crop=False)),
    "next": ("anyres", LlavaNextImageProcessorPil(image_grid_pinpoints=PINPOINTS, **CROP)),
    "onevision": (
        "anyres",
        LlavaOnevisionImageProcessorPil(
            size={"height": 32, "width": 32}, image_grid_pinpoints=PINPOINTS, do_center_crop=False
        ),
    ),
    "qwen": (
        "patches",
        Qwen2VLImageProcessorPil(patch_size=4, size={"shortest_edge": 1024, "longest_edge": 4096}),
    ),
    "idefics3": (
        "tiles",
        Idefics3ImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32}),
    ),
    "idefics3 whole": (
        "tiles",
        Idefics3ImageProcessorPil(
            size={"longest_edge": 64}, max_image_size={"longest_edge": 32}, do_image_splitting=False
        ),
    ),
}


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("name", PROCESSORS)
def test_pictures_are_prepared_as_by_the_processor(name, size, script):
    arrange, processor = PROCESSORS[name]
    image = picture(size)
    more = {"return_row_col_info": True} if arrange == "tiles" else {}
    images = [[image]] if arrange == "tiles" else [image]
    expected = processor.preprocess(images, return_tensors="np", **more)
    actual = script.PROCESS[arrange](image, processor.to_dict(), {})
    np.testing.assert_allclose(actual["pixel_values"], expected["pixel_values"], atol=1e-5)
    for other in ("image_sizes", "image_grid_thw"):
        if other in expected:
            assert np.array_equal(actual[other], expected[other])
    if arrange == "tiles":
        assert actual["grid"] == (expected["rows"][0][0], expected["cols"][0][0])


def test_a_thin_picture_does_not_grow_without_bounds(script):
    settings = {"size": {"shortest_edge": 1024}, "do_resize": True}
    with pytest.raises(ValueError, match="a picture of 1000 x 10 pixels is too thin"):
        script.sized(Image.new("RGB", (1000, 10)), settings)


@pytest.mark.parametrize("grid", [(0, 0), (1, 2), (3, 2)])
def test_the_text_of_tiles(grid, script):
    expected = get_image_prompt_string(*grid, 4, "<fake_token_around_image>", "<image>", "<global-img>")
    assert script.tile_text("<image>", 4, grid) == expected
