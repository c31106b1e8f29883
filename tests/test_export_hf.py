"""The exported directory: what is in it, what is refused, and that it is all or nothing."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import os
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import transformers
from ruamel.yaml import YAML
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.dynamic_module_utils import get_imports, get_relative_import_files, get_relative_imports

import vtwcli
from tests import reference, tiny
from tests.tiny import TINY
from vtwcli.errors import NotFoundError, UsageError, VtwError
from vtwcli.export.directory import publish as publishing
from vtwcli.export.directory.card import front_matter
from vtwcli.export.directory.manifest import check_files, read_manifest
from vtwcli.export.hf import weights
from vtwcli.export.hf.export import baked_schedule, export_hf
from vtwcli.export.hf.remote import travelling_code
from vtwcli.machine.libraries import versions
from vtwcli.models.hub import resolve
from vtwcli.runtime.contract import TESTED
from vtwcli.schedule.schedule import Schedule
from vtwcli.schedule.sentences import describe

K = 3
SCHEDULE = Schedule.withdraw_at(K, model="org/base")


@pytest.fixture(scope="module")
def base(tiny_dir, tmp_path_factory) -> Path:
    """A model directory as people have them: a card, a licence, sharded weights, leftovers of training."""
    path = tmp_path_factory.mktemp("base") / "model"
    shutil.copytree(tiny_dir, path)
    (path / "model.safetensors").unlink()
    tiny.llava().save_pretrained(path, max_shard_size="80KB")
    (path / "README.md").write_text(
        "---\nlicense: other\nlicense_name: house\nlicense_link: LICENSE\nlanguage:\n- en\nx: 1\n---\n# Base\n"
    )
    (path / "LICENSE").write_text("You may.")
    (path / "NOTICE").write_text("Made by us.")
    (path / "USE_POLICY.md").write_text("Be kind.")
    (path / "trainer_state.json").write_text("{}")
    (path / "pytorch_model.bin").write_bytes(b"pickle")
    return path


def calibration_result() -> dict:
    """A small calibration result in the shape that ``calibrate`` gives."""
    layers = 6
    curve = [1.0, 0.5, 0.1, 0.001, 0.0005, 0.0001]
    samples = [{"id": str(i), "task": t, "visual": 9} for i, t in enumerate(["colour", "colour", "count"])]
    return {
        "format": "vtw-calibration",
        "model": {"name": "org/base"},
        "num_layers": layers,
        "withdrawal_layer": K,
        "interval": [3, 4],
        "policy": "worst-task",
        "eta": 0.003,
        "positions": "answer",
        "min_layer": 1,
        "tasks": {
            "colour": {"samples": 2, "withdrawal_layer": 3, "kl": curve, "agreement": [0.5] * 3 + [1.0] * 3},
            "count": {
                "samples": 1,
                "withdrawal_layer": 3,
                "kl": [2 * x for x in curve],
                "agreement": [0.75] * 6,
            },
        },
        "kl": {"mean": curve, "samples": [curve, curve, [2 * x for x in curve]]},
        "agreement": {"mean": [0.5] * 3 + [1.0] * 3},
        "cost": {
            "convention": "flops",
            "visual_tokens": 9,
            "text_tokens": 12,
            "flops_ratio": {"flops": 0.7, "macs-2mlp": 0.7, "macs-3mlp": 0.7},
            "kv_ratio": 0.75,
        },
        "compromise": {"layer": 3, "kl": 0.001},
        "schedule": SCHEDULE.to_dict(),
        "samples": samples,
    }


@pytest.fixture(scope="module")
def calibration() -> dict:
    return calibration_result()


def evaluation() -> dict:
    """A small evaluation of two schedules in the shape that ``evaluate`` gives."""

    def compared(mean: float) -> dict:
        return {"mean": mean, "difference": mean - 1, "interval": [mean - 1.1, 0.0], "mcnemar": {"p": 0.5}}

    def row(k: int) -> dict:
        ratios = {"flops": 0.7, "macs-2mlp": 0.7, "macs-3mlp": 0.7}
        cost = {
            "convention": "flops",
            "flops_ratio": ratios,
            "flops": dict.fromkeys(ratios, 70),
            "flops_full": dict.fromkeys(ratios, 100),
            "kv_ratio": 0.75,
            "kv_bytes": {"measured": 750, "computed": 750, "full_measured": 1000, "full_computed": 1000},
            "visual_tokens": 9,
            "text_tokens": 12,
        }
        closeness = {"kl_first": 0.001, "kl_answer": 0.002, "top1_agreement": 0.9, "exact_sequences": 0.8}
        closeness |= {"first_divergence": 1.5, "worst_task": "colour", "worst_difference": -0.125}
        return {"schedule": Schedule.withdraw_at(k).to_dict(), "cost": cost, **closeness}

    colour = {"metric": "exact_match", "judged": 8, "full": {"mean": 1.0}}
    return {
        "format": "vtw-evaluation",
        "model": {"name": "/home/me/secret/base", "baseline": "/home/me/secret/base"},
        "tasks": {
            "colour": {**colour, "schedules": {"K=2": compared(0.5), "K=3": compared(0.875)}},
            "open": {"judged": 0},
        },
        "schedules": {"K=2": row(2), "K=3": row(3)},
        "gates": [],
    }


@pytest.fixture(scope="module")
def exported(base, calibration, tmp_path_factory) -> Path:
    """An export with everything that can be given."""
    target = tmp_path_factory.mktemp("exported") / "pruned"
    export_hf(
        str(base),
        SCHEDULE,
        target,
        calibration=calibration,
        evaluation=evaluation(),
        recipe="model: base  # mine\n",
    )
    return target


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def everything(folder: Path) -> dict[str, str]:
    """Relative name -> digest of all files below a directory."""
    return {str(file.relative_to(folder)): digest(file) for file in folder.rglob("*") if file.is_file()}


def nothing_left(folder: Path, *names: str) -> bool:
    """Whether a directory holds only ``names``, temporary directories included."""
    return sorted(entry.name for entry in folder.iterdir()) == sorted(names)


# ------------------------------------------------------------------ what is in it


def test_directory_holds_the_model_and_its_record(base, exported):
    names = {file.name for file in exported.iterdir()}
    shards = {file.name for file in base.glob("model-*.safetensors")}
    assert len(shards) > 1
    assert names == shards | {
        "config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json",
        "tokenizer_config.json", "processor_config.json", "chat_template.jinja", "LICENSE", "NOTICE", "USE_POLICY.md",
        "README.md",
        "modeling_vtw.py", *travelling_code(), "calibration.json", "calibration.png", "recipe.yaml", "manifest.json",
    }  # fmt: skip
    assert (exported / "recipe.yaml").read_text() == "model: base  # mine\n"
    for name in ("tokenizer.json", "processor_config.json", "chat_template.jinja", "generation_config.json"):
        assert digest(exported / name) == digest(base / name)
    with (exported / "calibration.png").open("rb") as picture:
        assert picture.read(8) == b"\x89PNG\r\n\x1a\n"


def test_the_code_is_what_transformers_takes_along(exported):
    """Its own search, which reads docstrings too, finds every file that was written and no other."""
    model = exported / "modeling_vtw.py"
    found = {Path(name).name for name in get_relative_import_files(model)}
    assert found | {model.name} == {file.name for file in exported.glob("*.py")}
    # releases before 5.10 take along what the model class names, and no more
    assert found == {f"{name}.py" for name in get_relative_imports(model)}
    for file in exported.glob("vtw_*.py"):
        assert "vtwcli" not in {name.partition(".")[0] for name in get_imports(file)}


def test_config_gains_the_schedule_and_keeps_the_rest(base, exported):
    old, new = (json.loads((path / "config.json").read_text()) for path in (base, exported))
    assert {key: value for key, value in new.items() if key not in ("auto_map", "vtw")} == old
    read = new["vtw"].pop("config")
    assert (read["text_config"]["hidden_size"], read[""]["tie_word_embeddings"]) == (32, False)
    assert new["vtw"] == {
        "schedule": {
            "format_version": 1,
            "actions": [{"at": K, "action": "withdraw"}],
            "provenance": {"model": "org/base"},
        },
        "layout": {"text_model": "model.language_model", "placeholder_ids": [98], "first_withdrawal": 0},
        "version": vtwcli.__version__,
        "transformers": transformers.__version__,
    }
    assert new["auto_map"] == {
        "AutoModelForImageTextToText": "modeling_vtw.LlavaForConditionalGeneration",
        "AutoModelForMultimodalLM": "modeling_vtw.LlavaForConditionalGeneration",
    }


def test_manifest_lists_every_file(exported):
    manifest = json.loads((exported / "manifest.json").read_text())
    found = everything(exported)
    del found["manifest.json"]
    assert {name: entry["sha256"] for name, entry in manifest["files"].items()} == found
    assert all((exported / name).stat().st_size == e["bytes"] for name, e in manifest["files"].items())
    assert manifest["producer"] == f"vtwcli {vtwcli.__version__}"
    assert manifest["versions"] == versions()
    assert manifest["tested"] == {"transformers": list(TESTED)}
    assert manifest["model"] == {"name": "model", "revision": None, "model_type": "llava"}
    assert (manifest["weights"], manifest["dtype"]) == ("linked", "float32")


def test_equal_exports_are_equal(base, exported, calibration, tmp_path):
    again = tmp_path / "pruned"
    recipe = (exported / "recipe.yaml").read_text()
    export_hf(str(base), SCHEDULE, again, calibration=calibration, evaluation=evaluation(), recipe=recipe)
    assert everything(again) == everything(exported)


def test_exported_model_follows_the_slow_reference(exported):
    model = AutoModelForImageTextToText.from_pretrained(exported, trust_remote_code=True)
    batch = TINY["llava"].batch(["t3 i t5", "t2 i t1 i t4", "t6"])
    tokens, _ = reference.greedy(tiny.llava(), batch, K, 5)
    out = model.generate(**batch, max_new_tokens=5, do_sample=False)
    assert out[:, batch["input_ids"].shape[1] :].tolist() == tokens.tolist()
    assert AutoProcessor.from_pretrained(exported).image_token == "<image>"


def test_package_loads_an_export_as_the_plain_model_and_knows_its_schedule(base, exported):
    loaded, plain = vtwcli.load(str(exported)), vtwcli.load(str(base))
    assert baked_schedule(loaded.config) == SCHEDULE
    assert baked_schedule(plain.config) is None
    batch = TINY["llava"].batch(["t3 i t5"])
    with torch.no_grad():
        assert torch.equal(loaded.model(**batch).logits, plain.model(**batch).logits)


# ------------------------------------------------------------------ weights


def test_weights_are_linked_untouched(base, exported):
    for file in base.glob("*.safetensors"):
        assert (exported / file.name).stat().st_ino == file.stat().st_ino
    assert digest(exported / "model.safetensors.index.json") == digest(base / "model.safetensors.index.json")


def test_weights_are_copied_where_they_cannot_be_linked(tiny_dir, tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(weights.os, "link", refuse)
    manifest = export_hf(str(tiny_dir), SCHEDULE, tmp_path / "out")
    source, copy = tiny_dir / "model.safetensors", tmp_path / "out" / "model.safetensors"
    assert manifest["weights"] == "copied"
    assert digest(source) == digest(copy)
    assert source.stat().st_ino != copy.stat().st_ino
    mask = os.umask(0)
    os.umask(mask)
    assert copy.stat().st_mode & 0o777 == 0o666 & ~mask


def test_links_of_a_hub_cache_are_followed(tiny_dir, tmp_path):
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in tiny_dir.iterdir():
        (snapshot / file.name).symlink_to(file)
    export_hf(str(snapshot), SCHEDULE, tmp_path / "out")
    assert not any(file.is_symlink() for file in (tmp_path / "out").iterdir())
    assert (tmp_path / "out" / "model.safetensors").stat().st_ino == (
        tiny_dir / "model.safetensors"
    ).stat().st_ino


def test_saving_over_an_export_leaves_the_base_alone(tiny_dir, tmp_path):
    export_hf(str(tiny_dir), SCHEDULE, tmp_path / "out")
    before = everything(tiny_dir)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", trust_remote_code=True)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    model.save_pretrained(tmp_path / "out")
    assert everything(tiny_dir) == before


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype_converts_as_torch_does(base, tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(weights, "_CHUNK", 1000)  # several runs per tensor, the last one short
    manifest = export_hf(str(base), SCHEDULE, tmp_path / "out", dtype=dtype)
    assert (manifest["weights"], manifest["dtype"]) == ("converted", dtype)
    wanted = getattr(torch, dtype)
    for file in base.glob("*.safetensors"):
        old, new = load_file(file), load_file(tmp_path / "out" / file.name)
        assert old.keys() == new.keys()
        assert all(torch.equal(new[key], old[key].to(wanted)) for key in old)
        with safe_open(tmp_path / "out" / file.name, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    original = json.loads((base / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == original["weight_map"]
    assert index["metadata"]["total_size"] * 2 == original["metadata"]["total_size"]
    exported = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", trust_remote_code=True)
    converted = AutoModelForImageTextToText.from_pretrained(base, dtype=wanted)
    state = converted.state_dict()
    assert exported.dtype == wanted
    assert all(torch.equal(value, state[key]) for key, value in exported.state_dict().items())


@pytest.mark.parametrize("model_type", ["qwen3_vl_moe", "gemma3", "llava_next", "molmo2"])
def test_converted_families_equal_what_transformers_converts(tmp_path, model_type):
    """Fused experts, tied heads, parameters outside modules: none is left in another type."""
    TINY[model_type].build().save_pretrained(tmp_path / "base")
    export_hf(str(tmp_path / "base"), Schedule.withdraw_at(K), tmp_path / "out", dtype="bfloat16")
    exported = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", trust_remote_code=True)
    state = AutoModelForImageTextToText.from_pretrained(tmp_path / "base", dtype=torch.bfloat16).state_dict()
    mine = exported.state_dict()
    assert mine.keys() == state.keys()
    assert all(mine[key].dtype == state[key].dtype and torch.equal(mine[key], state[key]) for key in state)


def test_integers_keep_their_type_and_equal_dtype_links(tiny_dir, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_dir, model)
    state = load_file(model / "model.safetensors")
    save_file(state | {"model.counter": torch.arange(3)}, model / "model.safetensors", {"format": "pt"})
    assert export_hf(str(model), SCHEDULE, tmp_path / "same", dtype="float32")["weights"] == "linked"
    export_hf(str(model), SCHEDULE, tmp_path / "half", dtype="bfloat16")
    assert torch.equal(load_file(tmp_path / "half" / "model.safetensors")["model.counter"], torch.arange(3))


def test_values_too_large_for_float16_are_refused(tiny_dir, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_dir, model)
    state = load_file(model / "model.safetensors")
    name = next(key for key in state if key.endswith("q_proj.weight"))
    state[name][0, 0] = 1e6
    save_file(state, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match="too large for float16"):
        export_hf(str(model), SCHEDULE, tmp_path / "out", dtype="float16")
    assert nothing_left(tmp_path, "model")


# ------------------------------------------------------------------ the card


def test_card_says_what_was_done(exported):
    text = (exported / "README.md").read_text()
    front = YAML(typ="safe").load(text.split("---")[1])
    assert front == {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["visual-token-withdrawal", "token-pruning", "vtwcli"],
        "license": "other",
        "license_name": "house",
        "license_link": "LICENSE",
        "language": ["en"],
    }
    assert "From layer 3 of 6 on there are no visual tokens" in text
    assert "K = 3 of 6 layers (policy worst-task, eta 0.003, answer positions, 95 % interval 3..4)" in text
    assert "![What withdrawing visual tokens changes, by layer](calibration.png)" in text
    assert "| count | 1 | 2.00e-03 | 75.0% |" in text
    assert all(f"| {cell} |" in text for cell in ("K=3", "1.000", "0.875", "-0.125"))
    assert "K=2" not in text
    assert "/home/me" not in text  # the evaluation knows the model by a path of its machine
    assert 'path = "pruned"' in text
    assert f"was tested with {', '.join(TESTED)}" in " ".join(text.split())
    assert "The processor needs, beside torch and transformers: `pillow` (for images)." in text
    assert "`house`" in text
    # 64 text and 576 visual tokens: half of the six layers hold 64 instead of 640
    assert "| KV cache after the prefill | 55.0% |" in text


def test_card_of_a_hub_model_names_its_base(tiny_dir, tmp_path):
    local = resolve(str(tiny_dir))
    hub = dataclasses.replace(local, name="org/model@main", revision="a" * 40)
    manifest = export_hf(hub, Schedule.withdraw_at(2), tmp_path / "out")
    front = YAML(typ="safe").load((tmp_path / "out" / "README.md").read_text().split("---\n")[1])
    assert front["base_model"] == "org/model"
    assert "license" not in front
    text = (tmp_path / "out" / "README.md").read_text()
    assert "state no licence" in text
    assert "a" * 40 in text
    assert manifest["model"] == {"name": "org/model", "revision": "a" * 40, "model_type": "llava"}
    assert str(tiny_dir) not in text


def test_card_tells_when_the_calibration_chose_otherwise(tiny_dir, tmp_path, calibration):
    export_hf(str(tiny_dir), Schedule.withdraw_at(4), tmp_path / "other", calibration=calibration)
    export_hf(str(tiny_dir), Schedule.withdraw_at(K), tmp_path / "same", calibration=calibration)
    note = "The schedule above is not the one that this calibration chose."
    assert note in (tmp_path / "other" / "README.md").read_text()
    assert note not in (tmp_path / "same" / "README.md").read_text()


def test_actions_are_sentences():
    data = [
        {"at": 0, "until": 1, "action": "mute", "sink": "first"},
        {"at": 1, "until": 4, "action": "freeze"},
        {"at": 4, "action": "keep", "select": {"score": "attention", "ratio": 0.25}},
        {"at": "auto", "after": 5, "action": "withdraw", "when": {"cosine_above": 0.999, "layers": 2}},
    ]
    said = [describe(action, 8) for action in Schedule.from_dict(data).actions]
    assert said == [
        "In layer 0 text does not read visual tokens; the attention goes to the first visual token.",
        "In layers 1-3 visual tokens are not updated; they still serve as keys and values.",
        "From layer 4 of 8 on only 25% of the visual tokens (most attention from the last token) remain.",
        "From the layer after the one where no visual token changes the attention output any more (cosine at least "
        "0.999), for the 2. time, looked for behind layer 5, there are no visual tokens: not in the hidden states, "
        "and not in the KV cache.",
    ]
    assert describe(Schedule.withdraw_at(8).actions[0], 8) == "No visual token leaves."


@pytest.mark.parametrize("text", ["no front matter", "---\n: [\n---\n", "---\njust text\n---\n", None])
def test_odd_cards_have_no_front_matter(tmp_path, text):
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    assert front_matter(tmp_path / "README.md") == {}


# ------------------------------------------------------------------ what is refused


def test_an_export_is_exported_again_only_by_force(base, exported, tmp_path):
    with pytest.raises(UsageError, match="has a schedule baked in already"):
        export_hf(str(exported), Schedule.withdraw_at(4), tmp_path / "again")
    assert nothing_left(tmp_path)
    manifest = export_hf(str(exported), Schedule.withdraw_at(4), tmp_path / "again", force=True)
    again = tmp_path / "again"
    assert manifest["model"]["name"] == "model"
    assert manifest["schedule"]["actions"] == [{"at": 4, "action": "withdraw"}]
    assert json.loads((again / "config.json").read_text())["vtw"]["schedule"] == manifest["schedule"]
    assert not (again / "calibration.json").exists()  # it was the old schedule's
    assert not (again / "calibration.png").exists()
    assert front_matter(again / "README.md")["license_name"] == "house"
    check_files(again, read_manifest(again))


def test_converted_weights_stay_converted_in_a_second_export(tiny_dir, tmp_path):
    export_hf(str(tiny_dir), SCHEDULE, tmp_path / "one", dtype="bfloat16")
    manifest = export_hf(str(tmp_path / "one"), Schedule.withdraw_at(2), tmp_path / "two", force=True)
    assert (manifest["weights"], manifest["dtype"]) == ("converted", "bfloat16")
    assert "converted to bfloat16" in (tmp_path / "two" / "README.md").read_text()


def test_an_existing_directory_is_replaced_only_by_force(tiny_dir, tmp_path):
    target = tmp_path / "out"
    export_hf(str(tiny_dir), SCHEDULE, target)
    before = everything(target)
    with pytest.raises(UsageError, match="exists already"):
        export_hf(str(tiny_dir), Schedule.withdraw_at(2), target)
    assert everything(target) == before
    with pytest.raises(UsageError, match="at is 9, but the model has 6 layers"):
        export_hf(str(tiny_dir), Schedule.withdraw_at(9), target, force=True)
    assert everything(target) == before
    export_hf(str(tiny_dir), Schedule.withdraw_at(2), target, force=True)
    check_files(target, read_manifest(target))
    assert read_manifest(target)["schedule"]["actions"] == [{"at": 2, "action": "withdraw"}]
    assert nothing_left(tmp_path, "out")


def test_the_model_itself_is_never_replaced(tiny_dir, tmp_path):
    model = tmp_path / "deep" / "model"
    shutil.copytree(tiny_dir, model)
    before = everything(tmp_path)
    for output in (model, tmp_path / "deep"):
        with pytest.raises(UsageError, match="holds the model itself"):
            export_hf(str(model), SCHEDULE, output, force=True)
    assert everything(tmp_path) == before


def test_bad_requests_are_refused_before_anything_is_written(tiny_dir, tmp_path, calibration):
    out = tmp_path / "out"

    def refused(error: type[Exception], match: str, schedule=SCHEDULE, model=None, **options) -> None:
        with pytest.raises(error, match=match):
            export_hf(model or str(tiny_dir), schedule, out, **options)
        assert nothing_left(tmp_path)

    refused(UsageError, "'int8' is not a dtype", dtype="int8")
    refused(NotFoundError, "there is no directory", model=str(tmp_path / "absent"))
    deeper = calibration | {"num_layers": 32}
    refused(UsageError, "a model with 32 layers, but .* has 6", calibration=deeper)
    refused(
        UsageError, "the evaluation is not of this schedule", Schedule.withdraw_at(5), evaluation=evaluation()
    )
    keep = {"at": 0, "action": "keep", "select": {"score": "attention", "ratio": 0.5}}
    refused(UsageError, "cannot be executed: action 1", Schedule.from_dict([keep]))
    trusting = dataclasses.replace(resolve(str(tiny_dir)), trust_remote_code=True)
    refused(UsageError, "runs transformers' class", model=trusting)


def test_an_adapter_is_refused(tiny_dir, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_dir, model)
    (model / "adapter_config.json").write_text("{}")
    with pytest.raises(UsageError, match="merge the adapter"):
        export_hf(str(model), SCHEDULE, tmp_path / "out")


def test_weights_that_transformers_would_not_find_are_an_error(tiny_dir, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_dir, model)
    state = load_file(model / "model.safetensors")
    name = next(key for key in state if key.endswith("layers.4.mlp.up_proj.weight"))
    del state[name]
    save_file(state, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(NotFoundError, match=r"are incomplete: 1 of \d+ tensors"):
        export_hf(str(model), SCHEDULE, tmp_path / "out")
    assert nothing_left(tmp_path, "model")


def test_a_code_map_of_the_base_is_left_out(tiny_dir, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_dir, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoConfig": "mine.Config"}}))
    (model / "mine.py").write_text("raise SystemExit('code of the base model ran')\n")
    export_hf(str(model), SCHEDULE, tmp_path / "out")
    assert "AutoConfig" not in json.loads((tmp_path / "out" / "config.json").read_text())["auto_map"]
    AutoModelForImageTextToText.from_pretrained(tmp_path / "out", trust_remote_code=True)


# ------------------------------------------------------------------ all or nothing


def in_child(work) -> multiprocessing.Process:
    """Start ``work`` in a forked process."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def test_kill_leaves_nothing_or_the_whole(tiny_dir, tmp_path):
    target = tmp_path / "out"
    began = time.monotonic()
    export_hf(str(tiny_dir), SCHEDULE, target, dtype="bfloat16")
    span = time.monotonic() - began
    shutil.rmtree(target)
    outcomes = set()
    for delay in [*(span * step / 10 for step in range(11)), None]:  # at last it may finish
        process = in_child(lambda: export_hf(str(tiny_dir), SCHEDULE, target, dtype="bfloat16"))
        process.join(delay)
        process.kill()
        process.join()
        outcomes.add(target.exists())
        if target.exists():
            check_files(target, read_manifest(target))
            shutil.rmtree(target)
    assert outcomes == {False, True}


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_kill_while_replacing_leaves_the_old_or_the_new(tiny_dir, tmp_path, monkeypatch, renames):
    target = tmp_path / "out"
    export_hf(str(tiny_dir), SCHEDULE, target)
    exchange = publishing.exchange

    def dying(one: Path, other: Path) -> bool:
        if renames == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        assert exchange(one, other)
        if renames == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return True

    monkeypatch.setattr(publishing, "exchange", dying)
    process = in_child(lambda: export_hf(str(tiny_dir), Schedule.withdraw_at(2), target, force=True))
    process.join()
    assert process.exitcode == (0 if renames == 2 else -signal.SIGKILL)
    check_files(target, read_manifest(target))
    assert read_manifest(target)["schedule"]["actions"][0]["at"] == (K if renames == 0 else 2)


def test_replacing_works_where_directories_cannot_be_exchanged(tiny_dir, tmp_path, monkeypatch):
    export_hf(str(tiny_dir), SCHEDULE, tmp_path / "out")
    monkeypatch.setattr(publishing, "exchange", lambda one, other: False)
    export_hf(str(tiny_dir), Schedule.withdraw_at(2), tmp_path / "out", force=True)
    check_files(tmp_path / "out", read_manifest(tmp_path / "out"))
    assert nothing_left(tmp_path, "out")


def test_a_full_disk_is_one_line_and_leaves_nothing(tiny_dir, tmp_path):
    """A limit on the size of files makes the system refuse the write, as a full disk does."""
    said = multiprocessing.get_context("fork").SimpleQueue()

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            export_hf(str(tiny_dir), SCHEDULE, tmp_path / "out", dtype="bfloat16")
        except VtwError as error:
            said.put((error.exit_code, str(error)))

    process = in_child(work)
    process.join()
    assert process.exitcode == 0
    code, text = said.get()
    assert code == 1
    assert text == f"{tmp_path / 'out'}: cannot write: File too large"
    assert nothing_left(tmp_path)


def test_a_target_that_cannot_be_written(tiny_dir):
    with pytest.raises(VtwError, match=r"/proc/vtw-out: cannot write"):
        export_hf(str(tiny_dir), SCHEDULE, Path("/proc/vtw-out"))


@pytest.mark.parametrize(
    ("file", "key"),
    [("tokenizer_config.json", "tokenizer_class"), ("processor_config.json", "processor_class")],
)
def test_a_class_that_the_release_does_not_have_is_refused(exported, tmp_path, file, key):
    folder = Path(shutil.copytree(exported, tmp_path / "newer"))
    document = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**document, key: "FromTheFuture"}))
    with pytest.raises(
        ValueError, match=r"transformers 5\.\S+ has no FromTheFuture, the class of the stored"
    ):
        AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
