"""Where visual tokens lie in the image, proved on real towers that see each patch by itself.

Attention inside the vision tower is switched off, so a visual token changes exactly when its own patch of the image
does. A dot is set into the middle of each token's box in turn: that token must change, and no token whose box is
elsewhere may.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from tests import tiny
from vtwcli.errors import NotFoundError
from vtwcli.models.families import FAMILIES
from vtwcli.models.geometry import grid, token_boxes
from vtwcli.sweep.layers import capture

PINPOINTS = tiny.ANYRES["image_grid_pinpoints"]
CLIP = {"size": {"shortest_edge": 12}, "crop_size": {"height": 12, "width": 12}}
PIXTRAL = {"size": {"longest_edge": 24}}
QWEN = {"patch_size": 4, "merge_size": 2, "size": {"shortest_edge": 64, "longest_edge": 64 * 24}}
NEXT = {
    "size": {"shortest_edge": 8},
    "crop_size": {"height": 8, "width": 8},
    "image_grid_pinpoints": PINPOINTS,
}
ONEVISION = {"size": {"height": 8, "width": 8}, "image_grid_pinpoints": PINPOINTS}

TYPES = {
    "gemma3": "token_type_ids",
    **dict.fromkeys(["qwen2_vl", "qwen2_5_vl", "qwen3_vl"], "mm_token_type_ids"),
}
CASES = {
    "llava": ("llava", CLIPImageProcessorPil(**CLIP), {}),
    "llava padded to a square": ("llava", LlavaImageProcessorPil(**CLIP, do_pad=True), {}),
    "llava with its class token": (
        "llava", CLIPImageProcessorPil(**CLIP), {"vision_feature_select_strategy": "full"}
    ),
    "llava squeezed": ("llava", CLIPImageProcessorPil(size={"height": 12, "width": 12}, do_center_crop=False), {}),
    "llava with a Pixtral tower": ("pixtral", PixtralImageProcessorPil(**PIXTRAL, patch_size=4), {}),
    "mistral3": ("mistral3", PixtralImageProcessorPil(**PIXTRAL, patch_size=8), {}),
    "paligemma": ("paligemma", SiglipImageProcessorPil(size={"height": 8, "width": 8}), {}),
    "gemma3": ("gemma3", Gemma3ImageProcessorPil(size={"height": 16, "width": 16}), {}),
    "qwen2_vl": ("qwen2_vl", Qwen2VLImageProcessorPil(**QWEN), {}),
    "qwen2_5_vl": ("qwen2_5_vl", Qwen2VLImageProcessorPil(**QWEN), {}),
    "qwen3_vl": ("qwen3_vl", Qwen2VLImageProcessorPil(**QWEN), {}),
    "llava_next": ("llava_next", LlavaNextImageProcessorPil(**NEXT), {}),
    "llava_onevision": ("llava_onevision", LlavaOnevisionImageProcessorPil(**ONEVISION), {}),
    "llava_onevision shrunk": (
        "llava_onevision", LlavaOnevisionImageProcessorPil(**ONEVISION), {"vision_aspect_ratio": "anyres_max_2"}
    ),
}  # fmt: skip


def blinkered(name: str, changes: dict):
    """The family's tiny model, with vision attention that adds nothing."""
    model = (tiny.TINY | tiny.VARIANTS)[name].build(layers=2, dtype=torch.float64)
    for key, value in changes.items():
        setattr(model.config, key, value)
    switched = 0
    tower = FAMILIES[model.config.model_type].vision[0]
    for path, module in model.get_submodule(tower).named_modules():
        if path.endswith(("attn.out_proj", "attn.proj", "attention.o_proj")):
            for parameter in module.parameters():
                torch.nn.init.zeros_(parameter)
            switched += 1
    assert switched == 2
    return model


def seen(model, inputs: dict, counts=range(1, 80)) -> tuple[torch.Tensor, int]:
    """Embeddings of the visual tokens [V, D], with as many placeholders as the model asks for."""
    for count in counts:
        ids = torch.tensor([[5, *[tiny.IMAGE_ID] * count, 6]])
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **inputs}
        if model.config.model_type in TYPES:
            batch[TYPES[model.config.model_type]] = (ids == tiny.IMAGE_ID).long()
        try:
            return capture(model, FAMILIES[model.config.model_type], batch).hidden[0, 1:-1], count
        except NotFoundError as error:
            last = error
    raise last


def encoded(processor, picture: np.ndarray) -> dict:
    inputs = processor(Image.fromarray(picture), return_tensors="pt")
    keep = ("pixel_values", "image_sizes", "image_grid_thw")
    return {k: v.double() if v.is_floating_point() else v for k, v in inputs.items() if k in keep}


@pytest.mark.parametrize("size", [(24, 40), (40, 24), (33, 33)], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_a_dot_in_a_tokens_box_changes_that_token_and_none_elsewhere(case, size):
    name, processor, changes = CASES[case]
    model = blinkered(name, changes)
    high, wide = size
    loaded = SimpleNamespace(
        family=FAMILIES[model.config.model_type],
        model=model,
        processor=SimpleNamespace(image_processor=processor),
    )
    blank = np.full((high, wide, 3), 40, dtype=np.uint8)
    inputs = encoded(processor, blank)
    before, count = seen(model, inputs)
    boxes = token_boxes(loaded, [Image.fromarray(blank)], inputs, count)
    assert boxes is not None
    assert len(boxes) == count
    # resampling spreads a dot over neighbours: a cubic kernel reaches two pixels of the coarser picture
    margin = 1 / 8 + 2 / min(size)
    apart = 0
    for token, (image, box) in enumerate(boxes):
        assert image == 0
        if box is None:
            continue
        x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
        picture = blank.copy()
        row, column = min(int(y * high), high - 1), min(int(x * wide), wide - 1)
        picture[max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2] = (250, 60, 200)
        after, _ = seen(model, encoded(processor, picture), [count])
        changed = ((after - before).abs().amax(-1) > 1e-9).tolist()
        assert changed[token], f"token {token} at {box} does not see its own middle"
        for other, (_, where) in enumerate(boxes):
            if where is None:
                assert not changed[other]
            elif not (
                where[0] - margin < x < where[2] + margin and where[1] - margin < y < where[3] + margin
            ):
                apart += 1
                assert not changed[other], f"token {other} at {where} sees a dot at {(x, y)}"
    assert apart or count <= 4


def test_boxes_of_several_images_name_their_image():
    name, processor, _ = CASES["llava"]
    loaded = SimpleNamespace(
        family=FAMILIES[name],
        model=tiny.TINY[name].build(layers=1),
        processor=SimpleNamespace(image_processor=processor),
    )
    images = [Image.new("RGB", (12, 12)), Image.new("RGB", (24, 12))]
    boxes = token_boxes(loaded, images, {}, 18)
    assert [image for image, _ in boxes] == [0] * 9 + [1] * 9
    assert boxes[0][1] == (0, 0, pytest.approx(1 / 3), pytest.approx(1 / 3))
    # the second is cropped to its middle half
    assert boxes[9][1] == (0.25, 0, pytest.approx(0.25 + 1 / 6), pytest.approx(1 / 3))


def test_unknown_families_and_counts_have_no_boxes():
    name, processor, _ = CASES["llava"]
    loaded = SimpleNamespace(
        family=FAMILIES["idefics2"], model=None, processor=SimpleNamespace(image_processor=processor)
    )
    image = Image.new("RGB", (12, 12))
    assert token_boxes(loaded, [image], {}, 9) is None
    loaded.family = FAMILIES[name]
    assert token_boxes(loaded, [image], {}, 7) is None
    assert token_boxes(loaded, [], {}, 0) is None


def test_a_grid_leaves_out_what_is_not_image():
    assert grid((-1, 0, 1, 1), 1, 2) == [None, (0, 0, 1, 1)]
    assert grid((0, 0, 1, 1), 2, 1) == [(0, 0, 1, 0.5), (0, 0.5, 1, 1)]
