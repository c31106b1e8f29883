"""Repositories of the Hub in miniature: each is read as it is, and goes through every command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor
from transformers.utils import is_torchvision_available

from tests.conftest import TEMPLATE
from tests.layouts import LAYOUTS
from vtwcli.data.sample import Sample
from vtwcli.errors import NotFoundError
from vtwcli.models.families import FAMILIES
from vtwcli.models.hub import resolve
from vtwcli.models.inputs import encode, end_ids
from vtwcli.models.loading import load
from vtwcli.models.requirements import processor_packages
from vtwcli.models.templates import template_of


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """Two questions about random pictures."""
    folder = tmp_path_factory.mktemp("rows")
    rng = np.random.default_rng(0)
    lines = []
    for i in range(2):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        lines.append(json.dumps({"image": f"{i}.png", "question": f"what is {i}?", "answer": "red"}))
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return folder / "rows.jsonl"


@pytest.mark.parametrize("place", ["chat_template.json", "processor_config.json"])
def test_named_templates_stand_in_any_file(place, tiny_dir, tmp_path):
    model = Path(shutil.copytree(tiny_dir, tmp_path / "model"))
    (model / "chat_template.jinja").unlink()
    there = json.loads((model / place).read_text()) if (model / place).exists() else {}
    other = {"name": "tool_use", "template": "{{ messages }}"}
    named = [other, {"name": "default", "template": TEMPLATE}]
    (model / place).write_text(json.dumps(there | {"chat_template": named}))
    assert template_of(load(str(model)).processor) == TEMPLATE
    (model / place).write_text(json.dumps(there | {"chat_template": ["x"]}))
    with pytest.raises(NotFoundError, match="its list of chat templates has no names"):
        load(str(model))


@pytest.mark.skipif(is_torchvision_available(), reason="nothing is missing")
@pytest.mark.parametrize("name", LAYOUTS)
def test_cards_name_torchvision_where_the_processor_cannot_be_loaded_without(name, tmp_path):
    LAYOUTS[name].write_processor(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": LAYOUTS[name].family}))
    missing = False
    try:
        AutoProcessor.from_pretrained(tmp_path)
    except (ImportError, ValueError) as error:
        missing = "torchvision" in str(error).lower()
    assert ("torchvision" in processor_packages(FAMILIES[LAYOUTS[name].family], tmp_path)) is missing


def test_cards_name_what_else_a_processor_needs(tmp_path):
    def needed(family: str) -> dict[str, str]:
        return processor_packages(FAMILIES[family], tmp_path)

    assert needed("llava") == {"pillow": "images"}
    assert needed("mistral3")["torchvision"] == "the processor"
    assert needed("lfm2_vl")["torchvision"] == "the image processor"
    assert needed("smolvlm")["num2words"] == "the processor"
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    assert needed("llava")["sentencepiece"] == "the tokenizer"
    (tmp_path / "tokenizer.json").write_text("{}")
    assert needed("llava") == {"pillow": "images"}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_repository_goes_through_every_command(name, rows, vtw, tmp_path):
    layout, model = LAYOUTS[name], tmp_path / "model"
    model.mkdir()
    state = layout.write(model)

    # every tensor is found, by its headers and by loading
    checkpoint = resolve(str(model))
    assert checkpoint.dtype == layout.dtype
    for own, stored in checkpoint.key_map.items():
        assert torch.equal(stored.read(), state[own]), own
    loaded = load(str(model), dtype="float32", device="cpu")
    found = loaded.model.state_dict()
    assert found.keys() == state.keys()
    for own, x in state.items():
        assert torch.equal(found[own], x.float()), own

    # the chat template is the one meant, the prompt shows a picture, and answers end where the files say
    encoded = encode(loaded, Sample("0", "t", (Image.new("RGB", (16, 16)),), "what is this?"))
    assert int(encoded.visual.sum()) > 0
    said = loaded.processor.tokenizer.decode(encoded.inputs["input_ids"][0])
    assert "what is this?" in said and ("USER: " in said) is (layout.template is not None)
    ends = 2 if layout.generation is None else layout.generation["eos_token_id"]
    assert end_ids(loaded) == tuple(ends if isinstance(ends, list) else [ends])

    brief = ("--data", rows, "--dtype", "float32", "--device", "cpu")
    for args in (
        ("calibrate", model, *brief, "--max-new-tokens", 2, "--eta", 100, "--output", "k.json"),
        (
            "eval",
            model,
            *brief,
            "--layers",
            2,
            "--max-new-tokens",
            2,
            "--bootstrap",
            0,
            "--no-timing",
            "--output",
            "e.json",
        ),
        ("export", model, "--layer", 2, "--evaluation", "e.json", "--output", "pruned"),
        ("verify", "pruned", "--base", model, "--device", "cpu", "--max-new-tokens", 2),
    ):
        code, _, err = vtw(*args)
        assert code == 0, (args, err)
    assert json.loads(Path("k.json").read_text())["num_layers"] == 3
    again = resolve("pruned")
    assert again.shards == checkpoint.shards and again.key_map.keys() == checkpoint.key_map.keys()
