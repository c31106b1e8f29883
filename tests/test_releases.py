"""Exports under other releases of transformers: the same tokens and cache lengths, or refused with a sentence.

``VTW_RELEASES`` names a folder with one folder a release, each named by its version and filled by
``pip install --no-deps --target`` with transformers and what it needs beside the installed packages.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.tiny import TINY, VARIANTS
from vtwcli.data.sample import Sample
from vtwcli.export.hf.export import export_hf
from vtwcli.models.families import family_of
from vtwcli.models.inputs import encode
from vtwcli.models.loading import load
from vtwcli.runtime import pruned
from vtwcli.runtime.contract import TESTED
from vtwcli.schedule.schedule import Schedule

FOLDER = os.environ.get("VTW_RELEASES")
RELEASES = sorted(path.name for path in Path(FOLDER).iterdir()) if FOLDER else []
pytestmark = pytest.mark.skipif(not RELEASES, reason="VTW_RELEASES names no folder of releases")

ROWS = ["t3 i t5", "t2 i t1 i t4"]
STEPS = 6
START_ID = 95
MODELS = {
    "plain": TINY["llava"],
    "any-resolution": TINY["llava_next"],
    "onevision": TINY["llava_onevision"],
    "internvl": TINY["internvl"],
    "tiles": TINY["idefics3"],
    "smolvlm": TINY["smolvlm"],
    "prefix": VARIANTS["paligemma2"],
    "three-axis": TINY["qwen2_vl"],
    "three-axis-windows": TINY["qwen2_5_vl"],
    "three-axis-glm": TINY["glm4v"],
    "deepstack": TINY["qwen3_vl"],
    "sliding-window": VARIANTS["gemma3-window"],
}
HUB = ("plain", "any-resolution", "three-axis", "three-axis-windows")
REFUSED = {
    ("4.57.6", "demo"),  # no class for its tokenizer
    ("4.57.6", "internvl"),  # takes its head for tied
}
# 4.57 rounds the places of patches otherwise in float32, with or without pruning
OTHERWISE = {("4.57.6", "tiles"), ("4.57.6", "smolvlm")}

WITHOUT_STATIC = {"prefix"}  # the library itself fails there

CHILD = '''
"""Loads exported directories, plain and pruned, and prints what they compute or why not, as JSON."""
import inspect, json, sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForImageTextToText, AutoProcessor

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

def answer(model, batch, steps, more):
    model.generation_config.pad_token_id = 0
    if "mm_token_type_ids" not in inspect.signature(type(model).forward).parameters:
        batch.pop("mm_token_type_ids", None)  # processors of releases without it do not give it either
    options = {"max_new_tokens": steps, "min_new_tokens": steps, "do_sample": False}
    out = model.eval().generate(**batch, **options, **more, return_dict_in_generate=True)
    cache = getattr(out, "cache", None) or out.past_key_values
    return {
        "tokens": out.sequences[:, batch["input_ids"].shape[1]:].tolist(),
        "entries": [int(layer.keys.shape[-2]) for layer in cache.layers],
    }

def tried(work):
    try:
        return work()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}

STATIC = {"cache_implementation": "static"}
root, steps, results = Path(sys.argv[1]), int(sys.argv[2]), {"release": transformers.__version__}
for directory in sorted(root.glob("*.export")):
    name = directory.name.removesuffix(".export")
    batch = torch.load(root / f"{name}.batch.pt", weights_only=True)
    found = results[name] = {}
    for kind, trust, more in (("plain", False, {}), ("pruned", True, {}), ("static", True, STATIC)):
        def work():
            model = AutoModelForImageTextToText.from_pretrained(directory, trust_remote_code=trust)
            return answer(model, batch, steps, more)
        found[kind] = tried(work)
print("RESULTS", json.dumps(results))
'''


def answer(model, batch: dict) -> dict:
    """As the child's."""
    options = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False}
    out = model.generate(**batch, **options, return_dict_in_generate=True)
    cache = getattr(out, "cache", None) or out.past_key_values
    return {
        "tokens": out.sequences[:, batch["input_ids"].shape[1] :].tolist(),
        "entries": [int(layer.keys.shape[-2]) for layer in cache.layers],
    }


def inputs_of(name: str, model) -> dict:
    """A ragged batch; where releases find images by the token that begins one, each image has it before it."""
    batch = MODELS[name].batch(ROWS)
    if hasattr(model.config, "vision_start_token_id"):
        model.config.vision_start_token_id = START_ID
        image = batch["input_ids"] == model.config.image_token_id
        batch["input_ids"][:, :-1][image[:, 1:] & ~image[:, :-1]] = START_ID
    return batch


def as_on_the_hub(folder: Path) -> None:
    """Give a checkpoint the names and settings that older releases wrote, as most models on the Hub have them."""
    file = folder / "model.safetensors"
    state = {
        re.sub(r"^vision_tower\.(?!vision_model)", "vision_tower.vision_model.", name): x
        for name, x in load_file(file).items()
    }
    save_file(state, file, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    text = config.get("text_config", config)
    rope = text.pop("rope_parameters")
    text["rope_theta"] = rope.pop("rope_theta")
    if rope.pop("rope_type") != "default" or rope:
        text["rope_scaling"] = {"type": "mrope", **rope}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tiny model of each kind and the demo, exported by the installed release, and what they answer there."""
    root = tmp_path_factory.mktemp("releases")
    expected = {}

    def make(name: str, model, batch: dict, layer: int, source: str) -> None:
        export_hf(source, Schedule.withdraw_at(layer), root / f"{name}.export")
        torch.save(batch, root / f"{name}.batch.pt")
        expected[name] = {"plain": answer(model, batch)}
        with pruned(model, layer):
            expected[name]["pruned"] = answer(model, batch)

    for name, tiny in MODELS.items():
        model = tiny.build(layers=8)
        batch = inputs_of(name, model)
        model.save_pretrained(root / name)
        layer = max(5, family_of(model.config).first_withdrawal)
        make(name, model, batch, layer, str(root / name))
        if name in HUB:
            as_on_the_hub(root / name)
            make(f"{name}-hub", model, batch, layer, str(root / name))
    demo = load("demo", dtype="float32")
    sample = Sample("one", "demo", (Image.new("RGB", (112, 112), (200, 40, 30)),), "What is it?")
    make("demo", demo.model, encode(demo, sample).inputs, 9, "demo")
    return root, expected


@pytest.fixture(scope="module", params=RELEASES)
def release(request, made):
    """A release's name and what the exports answer there."""
    root, _ = made
    environment = os.environ | {
        "PYTHONPATH": str((Path(FOLDER) / request.param).resolve()),
        "HF_MODULES_CACHE": str(root / f"modules-{request.param}"),
    }
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(root), str(STEPS)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=root,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULTS"))
    found = json.loads(line.removeprefix("RESULTS"))
    assert found["release"] == request.param
    return request.param, found


def test_the_releases_are_those_that_the_runtime_names():
    assert set(RELEASES) | {transformers.__version__} == set(TESTED)


@pytest.mark.parametrize("name", [*MODELS, *(f"{name}-hub" for name in HUB), "demo"])
def test_an_export_answers_the_same_or_refuses(made, release, name):
    expected, (version, found) = made[1][name], release
    plain, got = found[name]["plain"], found[name]["pruned"]
    if (version, name) in OTHERWISE:
        assert plain != expected["plain"], "the release computes as the newer ones do, so the export must too"
    elif "error" in got:
        assert plain != expected["plain"], "the plain model runs as it should, so the export must too"
        assert re.match(rf"(LoadingError|PruningError): .*transformers (is )?{version}.*", got["error"])
        assert (version, name) in REFUSED
    else:
        assert got == expected["pruned"]
        assert (version, name) not in REFUSED


@pytest.mark.parametrize("name", [*sorted(MODELS.keys() - WITHOUT_STATIC), "demo"])
def test_a_static_cache_answers_the_same_or_refuses(made, release, name):
    expected, (version, found) = made[1][name]["pruned"], release
    got = found[name]["static"]
    if "error" in found[name]["pruned"] or (version, name) in OTHERWISE:
        return  # told by the test above
    if tuple(map(int, version.split("."))) < (5, 20):
        assert "static caches under a schedule need transformers 5.20 or later" in got["error"]
    else:
        assert got["tokens"] == expected["tokens"]
        # a layer with a sliding window holds the newest token too
        assert all(
            a == b or name == "sliding-window"
            for a, b in zip(got["entries"], expected["entries"], strict=True)
        )
