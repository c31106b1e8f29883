"""``verify``: passes what is whole and right, and says what is not."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from vtwcli.errors import GateError, NotFoundError, UsageError
from vtwcli.export.directory.manifest import MANIFEST
from vtwcli.export.formats import verify
from vtwcli.export.hf.export import export_hf
from vtwcli.models.loading import load
from vtwcli.runtime import pruned
from vtwcli.schedule.schedule import Schedule

K = 3


@pytest.fixture(scope="module")
def good(tiny_dir, tmp_path_factory) -> Path:
    """A faithful export; copy it to change it."""
    target = tmp_path_factory.mktemp("good") / "export"
    export_hf(str(tiny_dir), Schedule.withdraw_at(K), target)
    return target


@pytest.fixture
def copy(good, tmp_path) -> Path:
    shutil.copytree(good, tmp_path / "export")
    return tmp_path / "export"


def sign_again(folder: Path) -> None:
    """Bring the manifest in line with the files, as somebody who changes a directory on purpose would."""
    manifest = json.loads((folder / MANIFEST).read_text())
    for name, entry in manifest["files"].items():
        data = (folder / name).read_bytes()
        entry |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / MANIFEST).write_text(json.dumps(manifest))


def test_report_of_a_good_export(good, tiny_dir):
    report = verify(good, base=str(tiny_dir), device="cpu")
    assert report["compared_with"] == str(tiny_dir)
    assert report["max_logit_difference"] <= 1e-4
    assert report["files"]["edited"] == report["files"]["unlisted"] == []
    assert report["schedule"]["actions"] == [{"at": K, "action": "withdraw"}]
    smoke = report["smoke"]
    assert smoke["visual_tokens"] == 9
    assert smoke["visual_per_layer"] == [9] * K + [0] * (6 - K)
    text = smoke["text_tokens"] + len(smoke["tokens"]) - 1
    assert smoke["cache_entries"] == [text + 9] * K + [text] * (6 - K)
    assert json.loads(json.dumps(report)) == report


def test_answer_is_the_runtimes(good, tiny_dir, tmp_path):
    Image.new("RGB", (20, 30), (200, 10, 10)).save(tmp_path / "red.png")
    report = verify(good, image=tmp_path / "red.png", device="cpu", max_new_tokens=5)
    loaded = load(str(tiny_dir), device="cpu")
    with Image.open(tmp_path / "red.png") as image:
        inputs = loaded.processor(
            text="USER: <image>\nDescribe the image. ASSISTANT:", images=[image], return_tensors="pt"
        )
    with pruned(loaded.model, K):
        out = loaded.model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert report["smoke"]["tokens"] == out[0, inputs["input_ids"].shape[1] :].tolist()
    assert report["smoke"]["image"] == str(tmp_path / "red.png")
    assert report["compared_with"] == "its own weights under the runtime"


@pytest.mark.parametrize(
    "schedule",
    [
        Schedule.withdraw_at(6),
        Schedule.from_dict(
            [
                {
                    "at": "auto",
                    "action": "keep",
                    "select": {"score": "contribution", "ratio": 0.5},
                    "when": {"cosine_below": 1.0},
                }
            ]
        ),
    ],
    ids=["nothing leaves", "dynamic"],
)
def test_other_schedules(tiny_dir, tmp_path, schedule):
    export_hf(str(tiny_dir), schedule, tmp_path / "export")
    report = verify(tmp_path / "export", device="cpu", max_new_tokens=3)
    seen = report["smoke"]["visual_per_layer"]
    assert seen[-1] == (9 if schedule.is_static else 5)


def test_converted_weights_are_compared_with_the_base_rounded_alike(tiny_dir, tmp_path):
    export_hf(str(tiny_dir), Schedule.withdraw_at(K), tmp_path / "export", dtype="float16")
    report = verify(tmp_path / "export", base=str(tiny_dir), device="cpu", dtype="float32")
    assert report["dtype"] == "float32"
    assert report["max_logit_difference"] <= 1e-4


def test_an_edited_card_and_further_files_are_told(copy):
    (copy / "README.md").write_text("my words")
    (copy / ".gitattributes").write_text("")
    report = verify(copy, device="cpu", max_new_tokens=1)
    assert report["files"]["edited"] == ["README.md"]
    assert report["files"]["unlisted"] == [".gitattributes"]


def flip(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-7] ^= 1
    (folder / "model.safetensors").write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (flip, r"does not match its manifest: model\.safetensors is changed"),
        (
            lambda folder: (folder / "tokenizer.json").unlink(),
            r"does not match its manifest: tokenizer\.json is missing",
        ),
        (
            lambda folder: [
                (folder / name).write_text("") for name in ("config.json", "generation_config.json")
            ],
            r"does not match its manifest: config\.json and 1 more files are of another size",
        ),
    ],
)
def test_damaged_files_fail(copy, damage, says):
    damage(copy)
    with pytest.raises(GateError, match=says):
        verify(copy, device="cpu")


def test_other_weights_fail_against_the_base(copy, tiny_dir):
    state = load_file(copy / "model.safetensors")
    name = next(key for key in state if key.endswith("layers.5.self_attn.v_proj.weight"))
    state[name] = state[name].flip(0)
    save_file(state, copy / "model.safetensors", {"format": "pt"})
    sign_again(copy)
    with pytest.raises(GateError, match=r"the exported model generates|logits differ"):
        verify(copy, base=str(tiny_dir), device="cpu")


def test_strange_code_runs_only_when_trusted(copy, tmp_path):
    """A runtime that prunes nothing: refused unread, and caught where it is allowed to run."""
    code = copy / "vtw_pruning.py"
    marker = tmp_path / "ran"
    code.write_text(
        f"open({str(marker)!r}, 'w').close()\nclass Idle:\n    trace = None\n\n"
        "def apply(model, schedule, layout):\n    model.__dict__['vtw_pruning'] = Idle()\n"
    )
    with pytest.raises(GateError, match=r"vtw_pruning\.py is"):
        verify(copy, device="cpu")
    sign_again(copy)
    with pytest.raises(UsageError, match=r"vtw_pruning\.py is not the code that this version"):
        verify(copy, device="cpu")
    assert not marker.exists()
    with pytest.raises(GateError, match="visual tokens by layer are"):
        verify(copy, device="cpu", trust_remote_code=True)
    assert marker.exists()


def test_code_that_transformers_does_not_take_fails(copy):
    config = json.loads((copy / "config.json").read_text())
    del config["auto_map"]
    (copy / "config.json").write_text(json.dumps(config))
    sign_again(copy)
    with pytest.raises(GateError, match="loads without its schedule"):
        verify(copy, device="cpu")


def test_two_schedules_fail(copy):
    config = json.loads((copy / "config.json").read_text())
    config["vtw"]["schedule"]["actions"][0]["at"] = 2
    (copy / "config.json").write_text(json.dumps(config))
    sign_again(copy)
    with pytest.raises(GateError, match=r"schedules in config\.json and in the manifest differ"):
        verify(copy, device="cpu")


def test_what_is_no_export_is_not_found(copy, tiny_dir, tmp_path):
    with pytest.raises(NotFoundError, match="has no manifest"):
        verify(tiny_dir)
    with pytest.raises(NotFoundError, match="there is no directory"):
        verify(tmp_path / "absent")
    manifest = json.loads((copy / MANIFEST).read_text())
    for changed, says in (
        ({"format": "vtw-other"}, "an export of the kind 'vtw-other'"),
        ({"format": "vtw-onnx"}, "is not a readable manifest"),
        ({"format_version": 2}, "has format version 2"),
        ({"files": {"../secret": {"bytes": 1, "sha256": ""}}}, "outside the directory"),
    ):
        (copy / MANIFEST).write_text(json.dumps(manifest | changed))
        with pytest.raises(NotFoundError, match=says):
            verify(copy)
    (copy / MANIFEST).write_text("{")
    with pytest.raises(NotFoundError, match="not a readable manifest"):
        verify(copy)


def test_unreadable_images_and_other_bases(good, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(NotFoundError, match=r"broken\.png"):
        verify(good, image=tmp_path / "broken.png")
    with pytest.raises(NotFoundError, match="there is no directory"):
        verify(good, base=str(tmp_path / "absent"), device="cpu")


def test_half_precision(good, tiny_dir):
    report = verify(good, base=str(tiny_dir), device="cpu", dtype="bfloat16", max_new_tokens=2)
    assert report["dtype"] == "bfloat16"
    assert torch.tensor(report["max_logit_difference"]).isfinite()
