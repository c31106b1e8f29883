"""Processors with a video part read images without torchvision, which only that part needs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.utils import is_torchvision_available

from tests import tiny
from tests.conftest import build_processor
from tests.processors import FAMILIES, save_processor
from vtwcli import Schedule, load, pruned
from vtwcli.data import pixels as pixels_module
from vtwcli.data.images import decode_image
from vtwcli.data.sample import Sample
from vtwcli.errors import NotFoundError
from vtwcli.export.onnx.export import export_onnx
from vtwcli.models.hub import resolve
from vtwcli.models.inputs import UnusableSampleError, encode, encode_batch


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


def test_of_a_batch_the_picture_that_the_processor_refuses_is_named(tmp_path):
    tiny.TINY["qwen2_vl"].build().save_pretrained(tmp_path)
    save_processor("qwen2_vl", tmp_path)
    loaded = load(str(tmp_path), dtype="float32", device="cpu")
    sizes = {"a": (16, 16), "wide:1": (2020, 10), "c": (16, 16)}
    samples = [Sample(name, "t", (Image.new("RGB", size),), "red?") for name, size in sizes.items()]
    with pytest.raises(UnusableSampleError) as caught:
        encode_batch(loaded, samples)
    assert caught.value.message.startswith(
        "the processor cannot encode sample 'wide:1': absolute aspect ratio"
    )
    assert caught.value.hint == "--skip-bad leaves such rows out"


@pytest.mark.skipif(is_torchvision_available(), reason="all is there")
@pytest.mark.parametrize(
    ("image_processor", "processor", "reason"),
    [
        ("Molmo2ImageProcessor", "Molmo2Processor", "Could not load any image processor class"),
        ("PixtralImageProcessor", "PixtralProcessor", "PixtralProcessor requires the Torchvision library"),
    ],
)
def test_a_processor_that_cannot_do_without_says_so(image_processor, processor, reason, tmp_path):
    tiny.llava().save_pretrained(tmp_path)
    build_processor().tokenizer.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": image_processor, "processor_class": processor})
    )
    with pytest.raises(NotFoundError, match="needs a package that is not installed: " + reason) as caught:
        load(str(tmp_path))
    assert caught.value.hint == (
        f"install torchvision 0.{int(torch.__version__.split('.')[1]) + 15} that is built for torch "
        f"{torch.__version__}, from the same index as torch"
    )


@pytest.mark.parametrize("family", ["qwen2_vl", "llava_onevision", "smolvlm"])
def test_exported_graphs_take_what_the_processor_makes(family, tmp_path):
    model, graphs = tmp_path / "model", tmp_path / "graphs"
    tiny.TINY[family].build(layers=2).save_pretrained(model)
    save_processor(family, model)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "pad_token_id": 0}))
    export_onnx(resolve(str(model)), 1, graphs, steps=3)
    video = "video_preprocessor_config.json"
    assert (graphs / video).read_text() == (model / video).read_text()
    # a camera's turn and 16 bits: the script and the loader must show the same
    pixels = np.random.default_rng(0).integers(0, 65536, (12, 20), dtype=np.uint16)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "picture.png", exif=exif)
    picture = decode_image("picture.png", "image", tmp_path)
    assert picture.size == (12, 20) and len(set(picture.getdata(0))) > 100
    loaded = load(str(model), dtype="float32", device="cpu")
    sample = Sample(id="0", task="t", prompt="what?", images=(picture,))
    inputs = encode(loaded, sample).inputs
    with pruned(loaded.model, Schedule.withdraw_at(1)):
        tokens = loaded.model.generate(**inputs, max_new_tokens=8, do_sample=False)
    expected = loaded.processor.tokenizer.decode(
        tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    command = [sys.executable, graphs / "run_onnx.py", "--image", tmp_path / "picture.png", "what?"]
    done = subprocess.run([*command, "--max-new-tokens", "8"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected.strip() != ""
    assert (graphs / "vtw_pixels.py").read_bytes() == Path(pixels_module.__file__).read_bytes()
    Image.new("RGB", (900, 4)).save(tmp_path / "picture.png")
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert (
        done.stderr
        == f"error: {tmp_path / 'picture.png'}: it is too thin: 900 x 4 pixels, at most 200 to 1 are shown\n"
    )
