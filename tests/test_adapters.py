"""Adapters of peft: merged they compute what peft computes, and what cannot be merged is one clear line."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from tests import parity, tiny
from vtwcli.errors import NotFoundError
from vtwcli.models import adapters
from vtwcli.models.hub import resolve
from vtwcli.models.loading import load

ROWS = ["t3 i t5", "t2 i t1 i t2"]
PARTS = r".*language_model.*\.(q_proj|down_proj)"


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """Where merged models go."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "vtwcli" / "merged"


@pytest.fixture
def train(tiny_dir, tmp_path):
    """Writes an adapter of the tiny model with random weights; gives its directory and the logits of peft."""

    def trained(name: str = "adapter", **settings) -> tuple[Path, torch.Tensor]:
        peft = pytest.importorskip("peft")
        torch.manual_seed(1)
        config = peft.LoraConfig(r=2, lora_alpha=8, init_lora_weights=False, **settings)
        model = peft.get_peft_model(tiny.llava(), config).eval()
        model.peft_config["default"].base_model_name_or_path = str(tiny_dir)
        for own, parameter in model.named_parameters():
            if "modules_to_save" in own:
                torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(tmp_path / name)
        with torch.no_grad():
            return tmp_path / name, model(**tiny.llava_batch(ROWS)).logits

    return trained


@pytest.fixture
def bare(tiny_dir, tmp_path) -> Path:
    """An adapter's files, for all that is found out before peft is asked."""
    folder = tmp_path / "bare"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tiny_dir)}))
    save_file({"x": torch.ones(1)}, folder / "adapter_model.safetensors")
    return folder


def edit(folder: Path, **settings) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def old_names(folder: Path) -> None:
    """Tensors as adapters name them that were trained before transformers 4.52."""
    file = folder / "adapter_model.safetensors"
    renamed = {
        name.replace("model.model.language_model.", "model.language_model.model.").replace(
            "model.model.multi_modal_projector.", "model.multi_modal_projector."
        ): x
        for name, x in load_file(file).items()
    }
    assert not any("base_model.model.model." in name for name in renamed)
    save_file(renamed, file, {"format": "pt"})


@pytest.mark.parametrize(
    ("settings", "old"),
    [
        ({"target_modules": PARTS}, False),
        ({"target_modules": PARTS}, True),
        ({"target_modules": PARTS, "modules_to_save": ["multi_modal_projector"], "use_dora": True}, False),
        ({"target_modules": ["lm_head", "embed_tokens", "q_proj"]}, False),
    ],
    ids=["layers", "old names", "whole modules", "both ends"],
)
def test_a_merged_adapter_computes_what_peft_computes(settings, old, train, cache):
    folder, logits = train(**settings)
    if old:
        old_names(folder)
    loaded = load(str(folder), dtype="float32", device="cpu")
    with torch.no_grad():
        found = loaded.model(**tiny.llava_batch(ROWS)).logits
    parity.same(loaded.model, found, logits)
    assert loaded.name == str(folder) and loaded.path.parent.parent == cache


def test_an_adapter_is_merged_once_and_again_when_it_changes(train, tiny_dir, cache, capfd):
    folder, _ = train(target_modules=PARTS)
    first = resolve(str(folder))
    said = capfd.readouterr().err
    assert f"merged the adapter '{folder}' into '{tiny_dir}': {first.path}" in said.replace("\n", "")
    assert {file.name for file in tiny_dir.iterdir()} == {file.name for file in first.path.iterdir()}
    assert first.adapter_of == str(tiny_dir)
    assert resolve(str(folder), weights=False).path == first.path and capfd.readouterr().err == ""
    (folder / "chat_template.jinja").write_text(
        "{{ messages }}"
    )  # of the trainer: it takes the base model's place
    second = resolve(str(folder))
    assert second.path != first.path
    assert (second.path / "chat_template.jinja").read_text() == "{{ messages }}"
    assert not list(cache.glob("*/.vtw-*"))


def test_an_adapter_goes_through_every_command(train, data, cache, vtw):
    folder, _ = train(target_modules=PARTS)
    (folder / "config.json").write_text("{}")  # what a trainer leaves there is not the model's
    brief = ("--data", data, "--limit", 2, "--max-new-tokens", 2)
    for args in (
        ("calibrate", folder, *brief, "--eta", 100, "--output", "k.json"),
        ("calibrate", folder, *brief, "--eta", 100, "--stream", "--output", "s.json"),
        ("eval", folder, *brief, "--layers", 2, "--bootstrap", 0, "--no-timing", "--output", "e.json"),
        ("export", folder, "--layer", 2, "--output", "pruned"),
        ("verify", "pruned", "--base", folder, "--max-new-tokens", 2),
    ):
        code, _, err = vtw(*args)
        assert code == 0, (args, err)
    card = Path("pruned/README.md").read_text()
    assert "`adapter`" in card and "The base model is an adapter, merged into `" in card


def failure(folder: Path) -> tuple[str, str | None]:
    with pytest.raises(NotFoundError) as caught:
        resolve(str(folder))
    assert "\n" not in str(caught.value)
    return caught.value.message, caught.value.hint


def test_without_peft_it_is_said_how(bare, tiny_dir, cache, monkeypatch):
    monkeypatch.setattr(adapters, "find_spec", lambda name: None)
    assert failure(bare) == (
        f"'{bare}' is an adapter of '{tiny_dir}', and merging the two needs peft, which is not installed",
        "pip install peft; or give a directory in which they are merged: merge_and_unload() and save_pretrained() "
        "of peft",
    )
    assert not cache.exists()


def test_what_an_adapter_lacks_is_one_line(bare, tiny_dir, tmp_path, cache, monkeypatch):
    weights = bare / "adapter_model.safetensors"
    weights.rename(bare / "adapter_model.bin")
    assert failure(bare)[0] == (
        f"the adapter '{bare}' has no adapter_model.safetensors; adapter_model.bin is pickle, which can run code and "
        "is not loaded"
    )
    (bare / "adapter_model.bin").rename(weights)
    edit(bare, base_model_name_or_path="/absent/model")
    message, hint = failure(bare)
    assert message == f"'{bare}' is an adapter of '/absent/model': there is no directory '/absent/model'"
    assert hint == f"base_model_name_or_path in {bare / 'adapter_config.json'} says where the model is"
    edit(bare, base_model_name_or_path="acme/model", revision="v1")
    assert "is an adapter of 'acme/model@v1': the model 'acme/model@v1' is not on this" in failure(bare)[0]
    for base in (None, "", 3):
        edit(bare, base_model_name_or_path=base)
        assert (
            failure(bare)[0]
            == f"'{bare}' is an adapter, and its adapter_config.json does not say of which model"
        )
    edit(bare, base_model_name_or_path=str(bare))
    assert failure(bare)[0] == f"'{bare}' is an adapter of '{bare}': which is an adapter itself"
    edit(bare, base_model_name_or_path=str(tiny_dir))
    monkeypatch.setattr(adapters, "find_spec", lambda name: True)
    monkeypatch.setattr(adapters, "memory_available", lambda device: 1000)
    assert "not enough memory to merge the adapter" in failure(bare)[0]
    (bare / "adapter_config.json").write_text("[]")
    assert failure(bare)[0].startswith(f"{bare / 'adapter_config.json'} cannot be read: it does not hold")


def test_an_adapter_of_another_model_is_one_line(train, tiny_dir, tmp_path, cache):
    folder, _ = train(target_modules=PARTS)
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    name = next(iter(weights))
    for other in (
        {own: x for own, x in weights.items() if own != name},
        weights | {name: weights[name][:1]},
        weights
        | {"base_model.model.model.language_model.layers.9.mlp.down_proj.lora_A.weight": torch.ones(2, 48)},
    ):
        save_file({own: x.contiguous() for own, x in other.items()}, file, {"format": "pt"})
        message, hint = failure(folder)
        assert message.startswith(f"the adapter '{folder}' cannot be merged into '{tiny_dir}': "), message
        assert (
            hint
            == f"base_model_name_or_path in {folder / 'adapter_config.json'} names the model that it was trained on"
        )
    save_file(weights, file, {"format": "pt"})
    edit(folder, peft_type="PROMPT_TUNING")
    assert f"the adapter '{folder}' cannot be merged into" in failure(folder)[0]
    assert not list(cache.glob("*/*"))


def test_a_tied_head_is_not_changed_in_one_place(train, tiny_dir, tmp_path, cache):
    folder, _ = train(target_modules=["lm_head"])
    tied = Path(shutil.copytree(tiny_dir, tmp_path / "tied"))
    config = json.loads((tied / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True
    (tied / "config.json").write_text(json.dumps(config))
    weights = load_file(tied / "model.safetensors")
    del weights["language_model.lm_head.weight"]
    save_file(weights, tied / "model.safetensors", {"format": "pt"})
    edit(folder, base_model_name_or_path=str(tied))
    assert re.search("it changes lm_head, whose weight is tied to another's$", failure(folder)[0])


def test_links_of_an_adapter_lead_nowhere_else(train, tmp_path, cache):
    folder, _ = train(target_modules=PARTS)
    (tmp_path / "secret").write_text("mine")
    (folder / "NOTICE").symlink_to(tmp_path / "secret")
    assert not (resolve(str(folder)).path / "NOTICE").exists()


def test_an_adapter_of_the_hub_keeps_its_commit(train, tmp_path, cache, monkeypatch):
    folder, _ = train(target_modules=PARTS)
    commit = "a" * 40
    repo = tmp_path / "hub" / "models--acme--adapter"
    shutil.copytree(folder, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    found = resolve("acme/adapter")
    assert (found.name, found.revision, found.path.name) == ("acme/adapter", commit, commit)
    (repo / "snapshots" / commit / "adapter_model.safetensors").unlink()
    with pytest.raises(NotFoundError, match="the adapter 'acme/adapter' has no adapter_model"):
        resolve("acme/adapter")
