"""Processors with a video part read images without torchvision, which only that part needs."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from tests import tiny
from tests.processors import FAMILIES, save_processor
from vtwcli import load
from vtwcli.data.sample import Sample
from vtwcli.models.inputs import encode


@pytest.mark.parametrize("family", FAMILIES)
def test_images_are_read_and_put_in_their_places(family, tmp_path):
    tiny.TINY[family].build().save_pretrained(tmp_path)
    save_processor(family, tmp_path)
    loaded = load(str(tmp_path), dtype="float32", device="cpu")
    images = (Image.new("RGB", (16, 16), "red"), Image.new("RGB", (16, 16), "blue"))
    for count, visual in enumerate((0, *FAMILIES[family][-1])):
        sample = Sample(id="0", task="t", prompt="what is this?", images=images[:count])
        encoded = encode(loaded, sample)
        assert int(encoded.visual.sum()) == visual
        with torch.no_grad():
            logits = loaded.model(**encoded.inputs).logits
        assert logits.isfinite().all()
